"""The moving average of a run's weights, which often gives better pictures than the last ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..config import Tensors
from .fsdp import piece


class MovingAverage:
    """Averages the parameters of the parts in training, in their own precision and place.

    After step n it moves towards them by 1 - min(decay, (1 + n) / (10 + n)), so that what a run
    begins with is soon forgotten.

    Args:
        decay: share of the average that is left after a step, late in the run.
    """

    def __init__(self, modules: Mapping[str, nn.Module], parts: Sequence[str], decay: float):
        self.modules = {part: modules[part] for part in parts}
        self.decay = decay
        self.averages: dict[str, dict[str, torch.Tensor]] = {}
        for part, module in self.modules.items():
            self.averages[part] = _copies(dict(module.named_parameters()))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights of a step, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for part, module in self.modules.items():
            for name, parameter in module.named_parameters():
                average = self.averages[part][name].to(parameter.device)
                self.averages[part][name] = average.lerp_(parameter, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules work with the averages until the block ends."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for part, module in self.modules.items():
            for name, parameter in module.named_parameters():
                weights = parameter.detach().clone()
                parameter.copy_(self.averages[part][name])
                self.averages[part][name] = weights

    def state_dicts(self) -> dict[str, Tensors]:
        """The parts' tensors, with averages in the place of parameters."""
        parts: dict[str, Tensors] = {}
        for part, module in self.modules.items():
            parts[part] = {**module.state_dict(), **self.averages[part]}
        return parts

    def load(self, parts: Mapping[str, Tensors]) -> None:
        """Go on from averages that were saved, or from the modules' own weights where none were."""
        for part, module in self.modules.items():
            saved = parts.get(part, {})
            for name, parameter in module.named_parameters():
                value = saved.get(name, parameter.detach())
                value = piece(value, parameter)
                self.averages[part][name] = value.to(parameter.device, parameter.dtype, copy=True)


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
