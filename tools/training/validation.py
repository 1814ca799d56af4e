"""What a run has learned, measured on records that it does not train on."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from cat_diffusion.cat_core.data.manifest import ManifestError
from cat_diffusion.cat_core.training.batches import Batches
from cat_diffusion.cat_core.training.objectives import Batch, Objective, combine
from cat_diffusion.cat_core.training.stores import FreshSamples

SEED = 0  # the same timesteps, noise and crops for every run


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


class Validation:
    """Measures an objective on fixed batches, and writes RUN/validation.csv."""

    def __init__(self, objective: torch.nn.Module, batches: Sequence[Batch], path: Path):
        self.objective = objective
        self.batches = batches
        self.path = path

    def measure(self, step: int) -> dict[str, float]:
        """The loss, and what the objective watches, over all batches; a line in the file."""
        figures = losses(self.objective, self.batches)
        is_new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", *figures])
            writer.writerow([step, *figures.values()])
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"\nvalidation after {step} steps: {shown}", flush=True)
        return figures


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
    figures = {"loss": loss.item()}
    for name, values in watched.items():
        figures[name] = torch.cat(values).nanmean().item()
    return figures
