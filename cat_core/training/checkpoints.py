"""A run's checkpoints: <folder>/checkpoint-00000500/{weights.safetensors, state.pt}.

Each is whole or not there: a folder written under a temporary name and renamed.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from .. import weights
from ..files import replacing_folder
from .settings import Settings, TrainingError, TrainingRun

WEIGHTS = "weights.safetensors"
STATE = "state.pt"
FIXED = {"batch_size", "warmup", "final_rate", "weight_decay", "precision", "seed"}


def newest(folder: Path | None) -> Path | None:
    """The latest complete checkpoint; None where there is none yet, and without a folder."""
    if folder is None:
        return None
    complete = []
    for path in folder.glob("checkpoint-*"):
        if path.name.rpartition("-")[2].isdigit():
            complete.append(path)
    return max(complete, default=None)


def newest_name(folder: Path | None) -> str:
    """The latest complete checkpoint as error messages speak of it."""
    checkpoint = newest(folder)
    return checkpoint.name if checkpoint else "none yet"


def read_state(checkpoint: Path) -> dict:
    """What a checkpoint holds besides weights."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def write(run: TrainingRun, step: int, optimiser: torch.optim.Optimizer, scaler) -> None:
    """Write the checkpoint of a run's first `step` steps; old ones go.

    `scaler` is fp16's, or None.

    Raises:
        TrainingError: the disk is full or read-only; the message names the newest checkpoint.
    """
    assert run.folder is not None
    target = run.folder / f"checkpoint-{step:08d}"
    state = {
        "step": step,
        "stage": run.stage.name,
        "settings": asdict(run.settings),
        "optimiser": optimiser.state_dict(),
        "scaler": scaler.state_dict() if scaler else {},
    }
    try:
        with replacing_folder(target) as partial:
            _write_weights(run, step, partial / WEIGHTS)
            torch.save(state, partial / STATE)
    # PyTorch says that a disk is full with a RuntimeError.
    except (OSError, RuntimeError, weights.WeightsError) as error:
        raise TrainingError(
            f"Cannot write {target} ({error}). Earlier checkpoints are whole, the newest is "
            f"{newest_name(run.folder)}. Free disk space and start the same command again; "
            "it continues from there."
        ) from error
    for old in sorted(run.folder.glob("checkpoint-*"))[: -run.settings.keep]:
        shutil.rmtree(old, ignore_errors=True)


def _write_weights(run: TrainingRun, step: int, path: Path) -> None:
    """Write the trained parts as a file that can be read by itself."""
    parts = {part: run.modules[part].state_dict() for part in run.stage.parts}
    metadata = weights.header(
        parts,
        run.architecture,
        licence=run.licence,
        provenance=f"{run.provenance}; stage {run.stage.name}, {step} steps",
    )
    weights.save(path, weights.flat(parts), metadata)


def resume(run: TrainingRun, optimiser: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into modules and optimiser; returns the step to go on with.

    Raises:
        TrainingError: the folder holds a run with other settings.
    """
    checkpoint = newest(run.folder)
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    changes = _changes(run, state)
    if changes:
        raise TrainingError(
            f"{run.folder} holds another run ({'; '.join(changes)}). Give the same settings to "
            "continue it, or another folder to start anew."
        )
    tensors, _ = weights.load_safetensors(str(checkpoint / WEIGHTS))
    parts, _ = weights.sort_keys(tensors)
    for part in run.stage.parts:
        run.modules[part].load_state_dict(parts[part])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


def _changes(run: TrainingRun, state: dict) -> list[str]:
    """What differs between a run and the one that left this state, as far as it matters."""
    changes = []
    if state["stage"] != run.stage.name:
        changes.append(f"stage was {state['stage']}, is {run.stage.name}")
    for key, value in asdict(run.settings).items():
        before = state["settings"].get(key, value)
        if _is_fixed(key, run.settings) and before != value:
            changes.append(f"{key} was {before}, is {value}")
    return changes


def _is_fixed(key: str, settings: Settings) -> bool:
    """Whether a run that goes on must keep this setting."""
    decays = settings.final_rate != 1  # by a cosine that ends with the last step
    return key in FIXED or (key == "steps" and decays)
