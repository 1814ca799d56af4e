"""Time that a GPU may still be busy with, and forms that are timed in turn."""

import time
from collections.abc import Callable, Mapping

import torch


class Stopwatch:
    """Times functions; what they leave to the GPU counts.

    Args:
        rounds: how often each form is timed.
        cuda: wait for the GPU.
    """

    def __init__(self, rounds: int, cuda: bool):
        self.rounds = rounds
        self.cuda = cuda

    def wait(self) -> None:
        """Until the GPU has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, function: Callable) -> tuple:
        """Seconds, and what the function returns."""
        self.wait()
        start = time.perf_counter()
        result = function()
        self.wait()
        return time.perf_counter() - start, result

    def seconds(self, function: Callable) -> float:
        """Of one call."""
        seconds, _ = self.timed(function)
        return seconds

    def repeated(self, function: Callable) -> list[float]:
        """Seconds of a function in each round, after a call that only warms up."""
        function()
        return [self.seconds(function) for _ in range(self.rounds)]

    def in_turn(
        self, measures: Mapping[str, Callable[[], float]], rounds: int | None = None
    ) -> dict[str, list[float]]:
        """What functions that return seconds measure, each form once a round.

        The order turns from round to round, and a first round only warms up.
        """
        names = list(measures)
        seconds = {name: [] for name in names}
        for name in names:
            measures[name]()
        for number in range(rounds or self.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(measures[name]())
        return seconds
