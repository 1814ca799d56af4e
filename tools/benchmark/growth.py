"""The section on growth: other sizes, batches, numbers of prompts and of adapters."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cat_diffusion.nodes.host import measuring, symbols

from .bench_models import Bench
from .multiplications import step_multiplications
from .rows import Row
from .step_sections import adapter_calls, seconds_of_calls


@dataclass(frozen=True)
class GrowthCase:
    """A step in which one thing is larger."""

    what: str
    build: Callable  # -> the model with its adapters
    size: int
    batch: int = 1


def growth(bench: Bench, arguments) -> Iterator[Row]:
    """A plain step of each case, and the shipped adapters' own time in it.

    That is too small to be told from the difference of two steps.
    """
    for case in _cases(bench, arguments):
        yield from _rows(bench, case)


def _cases(bench: Bench, arguments) -> list[GrowthCase]:
    size = arguments.growth_size
    square = f"{size} x {size}"
    cases = []
    for side in arguments.sizes:
        cases.append(GrowthCase(f"{side} x {side}", bench.apply, side))
    for batch in arguments.batches:
        what = f"{square}, batch of {batch}, one prompt"
        cases.append(GrowthCase(what, bench.apply, size, batch))
    for batch in arguments.batches:
        if batch > 1:
            what = f"{square}, batch of {batch}, a prompt each"
            cases.append(GrowthCase(what, _prompt_each(bench, size, batch), size, batch))
    for count in arguments.stacks:
        what = f"{square}, {count} adapters on each other"
        cases.append(GrowthCase(what, _stacked(bench, count), size))
    return cases


def _prompt_each(bench: Bench, size: int, batch: int) -> Callable:
    def build():
        return bench.apply(bench.see(*bench.picture(size, batch)))

    return build


def _stacked(bench: Bench, count: int) -> Callable:
    def build():
        model = bench.model
        for _ in range(count):
            model = bench.apply(model=model)
        return model

    return build


def _rows(bench: Bench, case: GrowthCase) -> Iterator[Row]:
    model = case.build()
    measuring.load_patches(model)
    calls = adapter_calls(bench, case.size, case.batch)  # which warms the plain step up
    plain = []
    for _ in range(max(bench.rounds // 3, 1)):
        plain.append(bench.step_seconds(bench.model, case.size, case.batch))
    measure = seconds_of_calls(bench, symbols.middle_patches(model), calls)
    adapters = bench.in_turn({case.what: measure})[case.what]
    without = step_multiplications(bench.model, case.size, case.batch)
    more = step_multiplications(model, case.size, case.batch) - without
    yield Row(f"{case.what}: plain step", "s", plain)
    shares = [seconds / statistics.median(plain) for seconds in adapters]
    note = f"multiplications x {more / without:.4f}"
    yield Row(f"{case.what}: adapters", "s", adapters, shares, note)
