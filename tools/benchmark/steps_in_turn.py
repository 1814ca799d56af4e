"""Whole pictures by several models, whose samplings take turns, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cat_diffusion.nodes.host import measuring

from .bench_models import Bench


@dataclass
class RunningSampling:
    """Where a sampling is, as a sampler of k-diffusion knows it."""

    denoiser: object
    x: torch.Tensor
    extra_args: dict


class SamplingsInTurn:
    """Each sampling starts the next one inside it; the innermost makes the steps of all.

    So the machine is as busy for one form as for the other.

    Args:
        models: by name.
        size: side of the picture in pixels.
    """

    def __init__(self, bench: Bench, models: Mapping, size: int, steps: int):
        self.bench = bench
        self.models = models
        self.size = size
        self.sigmas = measuring.schedule(bench.model, "ddim_uniform", steps)
        self.seconds: dict[str, list[float]] = {name: [] for name in models}  # of each step
        self.latents: dict[str, torch.Tensor] = {}
        self._running: dict[str, RunningSampling] = {}

    def draw(self) -> None:
        """Fill `seconds` and `latents`."""
        self._start(list(self.models))

    def _start(self, names: list[str]) -> None:
        if not names:
            self._make_steps()
            return
        first, *others = names

        def sampler(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
            self._running[first] = RunningSampling(denoiser, x, extra_args)
            self._start(others)
            return self._running[first].x

        self.latents[first] = self.bench.sample(self.models[first], sampler, self.sigmas, self.size)

    def _make_steps(self) -> None:
        names = list(self.models)
        # Neither form is always the first: what one leaves in the caches helps the next.
        for number in range(len(self.sigmas) - 1):
            for name in names:
                self._make_step(name, self.sigmas[number : number + 2])
            names.reverse()

    def _make_step(self, name: str, sigmas: torch.Tensor) -> None:
        """One Euler step of a form: the host's ddim."""
        running = self._running[name]

        def step():
            return measuring.euler_step(running.denoiser, running.x, sigmas, running.extra_args)

        seconds, running.x = self.bench.timed(step)
        self.seconds[name].append(seconds)
