"""What a run has learned, measured on records that it does not train on."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..data.manifest import ManifestError
from . import fsdp
from .average import MovingAverage
from .batches import Batches
from .checkpoints import Validated, path_of
from .log import FigureTable
from .objectives import Batch, Objective, combine
from .settings import Settings
from .stores import FreshSamples

LOSS = "loss"
AVERAGE_LOSS = "ema_loss"  # by which a run with an average is judged
SEED = 0  # the same timesteps, noise and crops for every run


class Validation:
    """Measures an objective on fixed batches, every few steps and after the last one."""

    def __init__(self, objective: torch.nn.Module, batches: Sequence[Batch], every: int):
        self.objective = objective
        self.batches = batches
        self.every = every

    def is_due(self, step: int, last: int) -> bool:
        """Whether to measure after a step of a run whose last step is known."""
        return step == last or step % self.every == 0

    def measure(self, average: MovingAverage | None = None) -> dict[str, float]:
        """The loss, and what the objective watches, over all batches.

        Args:
            average: of the weights; its figures come besides, named ema_loss and the like.
        """
        figures = losses(self.objective, self.batches)
        if average:
            with average.in_place():
                averaged = losses(self.objective, self.batches)
            figures |= {f"ema_{name}": value for name, value in averaged.items()}
        return figures


class ValidationLog(FigureTable):
    """RUN/validation.csv, and what follows from its lines: the best step, and whether to end.

    Nothing else remembers it, so a run that goes on knows as much as one that never stopped. All
    lines are judged by the same column, also in a file that an older version began without the
    average's.
    """

    def __init__(self, folder: Path, first: int, settings: Settings):
        super().__init__(folder / "validation.csv", first)
        self.folder = folder
        self.settings = settings
        self.last: Mapping[str, float] = {}  # figures of the latest line
        self.history: list[Validated] = []
        for row in self.rows:
            self._remember(int(row[0]), _figures(self.columns, row))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write and print what was measured after a step."""
        super().add(step, figures)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"\nvalidation after {step} steps: {shown}", flush=True)
        self._remember(step, figures)

    def _remember(self, step: int, figures: Mapping[str, float]) -> None:
        loss = figures.get(AVERAGE_LOSS if self.judges_average else LOSS, math.nan)
        self.last = {"step": step, **figures}
        self.history.append(Validated(step, loss if math.isfinite(loss) else math.inf))

    @property
    def judges_average(self) -> bool:
        """Whether losses are the moving average's, and not those of the weights themselves."""
        return AVERAGE_LOSS in self.columns

    @property
    def is_best(self) -> bool:
        """Whether the latest loss is lower than those of all checkpoints that are still there."""
        earlier = [before.loss for before in self.history[:-1] if self._is_kept(before)]
        return self.history[-1].loss < min(earlier, default=math.inf)

    def best(self) -> Validated | None:
        """The lowest loss among the checkpoints that are there, None where there is none."""
        kept = [entry for entry in self.history if self._is_kept(entry)]
        best = min(kept, key=lambda entry: entry.loss, default=None)
        return best if best and math.isfinite(best.loss) else None

    def is_out_of_patience(self) -> bool:
        """Whether as many validations as `patience` in a row were no better than one before."""
        patience = self.settings.patience
        if not patience or not self.history:
            return False
        losses_so_far = [entry.loss for entry in self.history]
        since_best = len(losses_so_far) - 1 - losses_so_far.index(min(losses_so_far))
        return since_best >= patience

    def _is_kept(self, entry: Validated) -> bool:
        return path_of(self.folder, entry.step).is_dir()


def _figures(columns: Sequence[str], row: Sequence[str]) -> dict[str, float]:
    """A line of the file but for its step."""
    return dict(zip(columns[1:], map(float, row[1:]), strict=True))


def validation_batches(
    fresh: FreshSamples,
    empty_context: torch.Tensor | None,
    *,
    samples: int,
    micro_batch_size: int,
) -> list[Batch]:
    """The batches that are validated on, encoded once: the same each time, and in each run.

    Nothing is dropped from them.

    Args:
        fresh: of the validation split.
        samples: how many; no more than there are records.
    Raises:
        ManifestError: there is no record.
    """
    if not len(fresh):
        raise ManifestError(
            "There is nothing to validate on: the manifest has no record of the validation split. "
            "Write some with tools/prepare_data.py --split validation, or give another "
            "--validation-split."
        )
    count = min(samples, len(fresh))
    source = Batches(fresh, micro_batch_size, SEED, empty_context)
    batches = []
    for start in range(0, count, micro_batch_size):
        positions = range(min(micro_batch_size, count - start))
        batch = source(start // micro_batch_size, positions)
        batch.pop("dropped", None)
        batches.append(batch)
    return batches


@torch.no_grad()
def losses(objective: torch.nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The loss over all batches as if they were one, and the means of what is watched."""
    judged: Objective = objective  # pyright: ignore - a module besides
    device = next(objective.parameters()).device
    was_training = {module: module.training for module in objective.modules()}
    objective.eval()
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, weight in judged.weights(batch).items():
            totals[name] = totals.get(name, 0) + weight.sum().to(device)
    loss = torch.zeros((), device=device)
    watched: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        on_device = {key: value.to(device) for key, value in batch.items()}
        terms, seen = objective(on_device)
        loss = loss + combine(judged, terms, totals)
        for name, value in seen.items():
            watched.setdefault(name, []).append(value)
    for module, training in was_training.items():
        module.training = training
    fsdp.forget_whole(objective)
    figures = {"loss": loss.item()}
    for name, values in watched.items():
        figures[name] = torch.cat(values).nanmean().item()
    return figures
