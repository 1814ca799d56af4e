"""Steps of the optimiser, over batches that are split or not, in one process or many."""

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from . import fsdp
from .objectives import Batch, combine
from .settings import Settings, TrainingError, TrainingRun


class Optimisation:
    """Steps of the optimiser, each over a global batch, however it is split."""

    def __init__(self, run: TrainingRun, accelerator, model: nn.Module, optimiser):
        self.objective = run.objective
        self.settings = run.settings
        self.accelerator = accelerator
        self.model = model  # the objective, as accelerate wraps it
        self.optimiser = optimiser
        self.skipped = 0  # steps of this process's life whose gradients were no numbers
        self.skipped_in_a_row = 0

    def step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """One step over this process's share of the global batch.

        Returns the global batch's loss, terms and watched means.
        """
        totals = self._total_weights(batches)
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, torch.Tensor] = {}  # of the rows behind a watched mean
        for number, batch in enumerate(batches, 1):
            # Processes exchange gradients once a step, with those of the last part.
            is_last = number == len(batches)
            with self._exchanging(is_last):
                self._accumulate(batch, totals, sums, counts)
        figures = self._reduced(sums)
        for name, count in self._reduced(counts).items():
            figures[name] /= max(count, 1)
        figures["grad_norm"] = self._clip()
        self._update(step, figures)
        figures["skipped"] = self.skipped
        return figures

    def _exchanging(self, is_last: bool) -> AbstractContextManager:
        """The block whose gradients are exchanged, or kept for those that follow."""
        if fsdp.is_sharded(self.model):
            self.model.set_requires_gradient_sync(is_last)  # pyright: ignore - FSDP's own
            return nullcontext()
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def _clip(self) -> float:
        """The length of all gradients together, which are shortened where that is asked for."""
        parameters = []
        for group in self.optimiser.param_groups:
            parameters += group["params"]
        longest = self.settings.max_grad_norm or math.inf
        return float(fsdp.whole(self.accelerator.clip_grad_norm_(parameters, longest)))

    def _update(self, step: int, figures: Mapping[str, float]) -> None:
        """Let the optimiser step, unless there is nothing to learn from."""
        is_finite = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * rate_share(step, self.settings)
        # fp16's scaler skips by itself, and learns from it which scale numbers bear.
        if is_finite or self.accelerator.scaler is not None:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1

    def _total_weights(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """The weights of each term, summed over the global batch."""
        totals: dict[str, torch.Tensor] = {}
        for batch in batches:
            for name, weight in self.objective.weights(batch).items():
                _add(totals, name, weight.sum().to(self.accelerator.device))
        return {name: self.accelerator.reduce(total) for name, total in totals.items()}

    def _accumulate(self, batch: Batch, totals, sums, counts) -> None:
        """Add a part's gradients to the parameters', its figures to `sums` and `counts`."""
        batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
        with self.accelerator.autocast():
            terms, watched = self.model(batch)
        loss = combine(self.objective, terms, totals)
        # Processes' gradients are averaged, their losses are summed.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        _add(sums, "loss", loss)
        for name, value in terms.items():
            _add(sums, name, value.sum() / (totals[name] + self.objective.extra[name]))
        for name, value in watched.items():  # NaN in rows without a mask: nothing to watch
            _add(sums, name, value.nansum())
            _add(counts, name, (~value.isnan()).sum())

    def _reduced(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sums over all processes."""
        return {name: self.accelerator.reduce(value).item() for name, value in sums.items()}


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = sums.get(name, 0) + value.detach().float()


def rate_share(step: int, settings: Settings) -> float:
    """Share of the stage's rates: a linear rise, times a cosine from 1 to `final_rate`."""
    rise = min(1.0, (step + 1) / max(settings.warmup, 1))
    decay = (1 + math.cos(math.pi * step / settings.steps)) / 2
    return rise * (settings.final_rate + (1 - settings.final_rate) * decay)


def freeze_others(run: TrainingRun) -> None:
    """Let the stage's parts learn, and no others."""
    for part, module in run.modules.items():
        learns = part in run.stage.parts
        module.requires_grad_(learns).train(learns)


def new_optimiser(run: TrainingRun, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the stage's parts, each at its rate."""
    groups = []
    for part, rate in run.stage.rates:
        parameters = list(run.modules[part].parameters())
        groups.append({"params": parameters, "lr": rate, "rate": rate})
    decay = run.settings.weight_decay
    if run.settings.use_8bit_adam:
        return _bitsandbytes().optim.AdamW8bit(groups, weight_decay=decay)
    # One kernel for all, without the copies that PyTorch's other ways make of all weights.
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(groups, weight_decay=decay, fused=fused)


def _bitsandbytes():
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise TrainingError(
            f"AdamW in 8 bits needs bitsandbytes, which cannot be imported ({error}). Install it "
            f'with: "{sys.executable}" -m pip install bitsandbytes; or train without '
            "--use-8bit-adam."
        ) from error
