"""The sections that look inside: torch.compile, kernels of a step, operators of the adapters."""

from collections.abc import Callable, Iterator

from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .adapter_forms import PLAIN, SHIPPED
from .bench_models import Bench
from .rows import Row, rows_in_turn
from .step_sections import adapter_calls, adapter_patches

LEAST_SHARE = 0.03  # of the time, for an operator to be shown


def compiled(bench: Bench, arguments) -> Iterator[Row]:
    """A step with and without torch.compile, plain and as shipped."""
    size = arguments.size
    for name, model in ((PLAIN, bench.model.clone()), (SHIPPED, bench.apply())):
        fast = model.clone()
        set_torch_compile_wrapper(fast, backend="inductor")
        try:
            first, _ = bench.timed(lambda fast=fast: bench.step_seconds(fast, size))
        except Exception as error:  # whatever a compiler throws
            yield Row(
                f"{name}: torch.compile does not work here",
                "s",
                [0.0],
                note=f"{type(error).__name__}: {str(error)[:200]}",
            )
            continue
        yield Row(f"{name}: first step, compiling", "s", [first])
        measures = {
            f"{name}: eager": lambda model=model: bench.step_seconds(model, size),
            f"{name}: compiled": lambda fast=fast: bench.step_seconds(fast, size),
        }
        yield from rows_in_turn(bench.in_turn(measures), f"{name}: eager")


def kernels(bench: Bench, arguments) -> Iterator[Row]:
    """Kernel time and launches of a step, as torch.profiler sees them; on a CPU operators."""
    what = "kernels" if bench.cuda else "operators"
    plain = None
    for name, model in bench.forms().items():
        count, seconds = _launches(bench, model, arguments.size)
        counts = []
        times = []
        if plain:
            counts.append(count / plain[0])
            times.append(seconds / plain[1])
        else:
            plain = count, seconds
        yield Row(f"{what}, {name}", "launches", [float(count)], counts)
        yield Row(f"time in {what}, {name}", "s", [seconds], times)


def _launches(bench: Bench, model, size: int) -> tuple[int, float]:
    """How many kernels a step launches, and the seconds in them."""
    device = DeviceType.CUDA if bench.cuda else DeviceType.CPU
    events = []

    def watch(step):
        step()  # warms up
        profiler = _profiled(bench, step)
        for event in profiler.events():
            if event.device_type == device:
                events.append(event)

    bench.inside_sampling(model, watch, size)
    return len(events), sum(_own_time(bench, event) for event in events) / 1e6


def _profiled(bench: Bench, function: Callable) -> profile:
    activity = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    bench.wait()
    with profile(activities=[activity]) as profiler:
        function()
        bench.wait()
    return profiler


def _own_time(bench: Bench, event) -> float:
    """Microseconds of an event, without those of the events inside it."""
    return event.self_device_time_total if bench.cuda else event.self_cpu_time_total


def adapter_operators(bench: Bench, arguments) -> Iterator[Row]:
    """Where the time of the adapters of one step goes, by operator (on a GPU by kernel)."""
    calls = adapter_calls(bench, arguments.size)
    for name, patch in adapter_patches(bench).items():

        def call_all(patch=patch):
            for x, options in calls:
                patch(x, options)

        call_all()  # warms up
        events = list(_profiled(bench, call_all).key_averages())
        events.sort(key=lambda event: -_own_time(bench, event))
        total = sum(_own_time(bench, event) for event in events)
        yield Row(name, "ms", [total / 1000])
        for event in events:
            time = _own_time(bench, event)
            if time >= LEAST_SHARE * total:
                note = f"{event.count} calls, {time / total:.0%}"
                yield Row(f"  {event.key[:60]}", "ms", [time / 1000], note=note)
