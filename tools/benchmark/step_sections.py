"""The sections on one step: its multiplications, its time, and the adapters alone."""

from collections.abc import Callable, Iterator

import torch

from cat_diffusion.nodes.host import measuring, memory, symbols

from .adapter_forms import (
    OFFICIAL,
    ONCE,
    PLAIN,
    SHIPPED,
    SKIPPED,
    KeptKeysPatch,
    SkippingPatch,
)
from .bench_models import PAPER_STEPS, Bench
from .multiplications import counted, step_multiplications
from .rows import Row, rows_in_turn

COPIED = 2**28  # bytes, too many for any cache


def operations(bench: Bench, arguments) -> Iterator[Row]:
    """Multiplications of a step of each form, and of what runs once a picture."""
    size = arguments.size
    forms = bench.forms()
    plain = step_multiplications(forms.pop(PLAIN), size)
    yield Row(f"a step, {PLAIN}", "GMAC", [plain])
    for name, model in forms.items():
        count = step_multiplications(model, size)
        yield Row(f"a step, {name}", "GMAC", [count], [count / plain])

    def see():
        bench.see(*bench.picture(size))

    once = {"CLIP vision, CLIP text, SemInpainter": see, "folding": bench.apply}
    for what, function in once.items():
        count = counted(function)
        share = count / PAPER_STEPS / plain
        yield Row(f"once: {what}", "GMAC", [count], [share], f"of {PAPER_STEPS} plain steps")


def step(bench: Bench, arguments) -> Iterator[Row]:
    """One step of each form, in turn, and the memory that the forms hold."""
    forms = bench.forms()
    measures = {}
    for name, model in forms.items():
        measures[name] = _step_of(bench, model, arguments.size)
    yield from rows_in_turn(bench.in_turn(measures), PLAIN)
    for name, model in forms.items():
        megabytes = measuring.bytes_of_patches(model) / 1e6
        what = f"weights beside the U-Net, {name}"
        yield Row(what, "MB", [megabytes], note="as the host counts them")
    if not bench.cuda:
        return
    for name, model in forms.items():
        memory.clear_memory()
        torch.cuda.reset_peak_memory_stats()
        bench.step_seconds(model, arguments.size)
        peak = torch.cuda.max_memory_allocated() / 1e6
        yield Row(f"peak GPU memory, {name}", "MB", [peak])


def _step_of(bench: Bench, model, size: int) -> Callable[[], float]:
    def measure() -> float:
        return bench.step_seconds(model, size)

    return measure


def adapter(bench: Bench, arguments) -> Iterator[Row]:
    """The adapters of one step, called with the shapes that the U-Net calls them with.

    And what they must read and write at least, over the time that takes.
    """
    calls = adapter_calls(bench, arguments.size)
    patches = adapter_patches(bench)
    measures = {}
    for name, patch in patches.items():
        measures[name] = seconds_of_calls(bench, [patch], calls)
    seconds = bench.in_turn(measures, 3 * bench.rounds)
    yield from rows_in_turn(seconds, OFFICIAL)

    # What the machine reaches at best, to tell how far the adapters are from it.
    large = torch.empty(COPIED, dtype=torch.uint8, device=calls[0][0].device)
    copying = bench.repeated(large.clone)
    bandwidth = [2 * large.nbytes / one / 1e9 for one in copying]
    yield Row("memory bandwidth, copying 268 MB", "GB/s", bandwidth)

    shipped = seconds[SHIPPED]
    least = patches[SHIPPED].folded.model_size()
    for x, _ in calls:
        least += 2 * x.nbytes
    ceiling = 2 * large.nbytes / min(copying)
    reached = [least / one / 1e9 for one in shipped]
    shares = [least / one / ceiling for one in shipped]
    what = "memory bandwidth, CAT as shipped at least"
    yield Row(what, "GB/s", reached, shares, "of copying")


def adapter_calls(bench: Bench, size: int, batch: int = 1) -> list[tuple]:
    """The arguments that a step calls a patch with: random numbers of the shapes, and options."""
    calls = []

    def record(x, extra_options):
        calls.append((torch.randn_like(x), symbols.options_to_repeat(extra_options)))
        return x

    model = bench.model.clone()
    symbols.add_middle_patch(model, record)
    bench.step_seconds(model, size, batch)
    # A GPU makes several steps; the last one's calls are as good as any.
    return calls[-len(bench.cat_model.architecture.ref_adapter.blocks) :]


def adapter_patches(bench: Bench) -> dict:
    """The forms of the adapters, from the official one to the shipped one, loaded."""
    forms = {
        OFFICIAL: bench.official(),
        ONCE: bench.official(KeptKeysPatch),
        SKIPPED: bench.official(SkippingPatch),
        SHIPPED: bench.apply(),
    }
    measuring.load_patches(*forms.values())
    return {name: symbols.middle_patches(model)[0] for name, model in forms.items()}


def seconds_of_calls(bench: Bench, patches: list, calls: list[tuple]) -> Callable[[], float]:
    """A function that measures the seconds of all calls of all patches, one after the other."""

    def work():
        for patch in patches:
            for x, options in calls:
                patch(x, options)

    def measure() -> float:
        return bench.seconds(work)

    return measure
