"""A run's checkpoints: <folder>/checkpoint-00000500/{weights.safetensors, state.pt}.

With a moving average also ema.safetensors, like the weights. best.json beside them names the one of
the lowest validation loss, where it is kept.

Each is whole or not there: a folder written under a temporary name and renamed.
"""

import json
import math
import pickle
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import weights
from ..config import Tensors
from ..files import replacing_folder, write_text
from ..weights import trained_stages
from ..weights.trained_stages import TrainedStage
from . import fsdp, identity
from .average import MovingAverage
from .settings import Settings, TrainingError, TrainingRun

WEIGHTS = "weights.safetensors"
EMA = "ema.safetensors"
STATE = "state.pt"
BEST = "best.json"
FIXED = {
    "batch_size",
    "warmup",
    "final_rate",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "snr_gamma",
    "use_8bit_adam",
    "precision",
    "seed",
}
# How files tell that they were cut, emptied, removed or changed: by PyTorch's zip reader a
# RuntimeError, by its pickles all the others.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    pickle.UnpicklingError,
    weights.WeightsError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int = 0  # steps that it has done already
    scaler: Mapping[str, Any] = field(default_factory=dict)  # fp16's state
    damaged: Mapping[Path, str] = field(default_factory=dict)  # newer checkpoint -> what is wrong
    sentences: Sequence[str] = ()  # that the user should read


@dataclass(frozen=True)
class Trained:
    """What a run has learned so far, whole, however its processes share it."""

    parts: Mapping[str, Tensors]
    optimiser: Mapping[str, Any]  # its state
    averages: Mapping[str, Tensors] = field(default_factory=dict)  # by part, where there are any
    decay: float = 0.0  # of the averages

    @classmethod
    def of(
        cls,
        run: TrainingRun,
        optimiser: torch.optim.Optimizer,
        average: MovingAverage | None = None,
        keep: bool = True,
    ) -> "Trained":
        """What the processes have now; with FSDP all of them have to ask.

        Args:
            keep: this process is to write it.
        """
        parts = {part: run.modules[part].state_dict() for part in run.stage.parts}
        return cls(
            fsdp.whole(parts, keep),
            fsdp.whole(optimiser.state_dict(), keep),
            fsdp.whole(average.state_dicts(), keep) if average else {},
            average.decay if average else 0.0,
        )


class Validated(NamedTuple):
    """A step, and the loss that was measured after it on held-out records."""

    step: int
    loss: float


def newest(folder: Path | None) -> Path | None:
    """The latest checkpoint; None where there is none yet, and without a folder."""
    return max(_all(folder), default=None)


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a run's first `step` steps, whether it is there or not."""
    return folder / f"checkpoint-{step:08d}"


def newest_name(folder: Path | None) -> str:
    """The latest checkpoint as error messages speak of it."""
    checkpoint = newest(folder)
    return checkpoint.name if checkpoint else "none yet"


def read_state(checkpoint: Path, mapped: bool = False) -> dict:
    """What a checkpoint holds besides weights.

    Args:
        mapped: leave the tensors on the disk until they are used.
    """
    if not mapped:
        # PyTorch writes checksums, and reads without a look at them.
        with zipfile.ZipFile(checkpoint / STATE) as archive:
            changed = archive.testzip()
        if changed is not None:
            raise ValueError(f"{changed} in {STATE} has other bytes than were written")
    state = torch.load(
        checkpoint / STATE, map_location="cpu", weights_only=True, mmap=mapped or None
    )
    if not isinstance(state, dict) or not state.keys() >= {"step", "stage", "settings"}:
        raise ValueError(f"{STATE} is not the state of a run")
    return state


def write(
    run: TrainingRun,
    step: int,
    trained: Trained,
    scaler,
    measured: Mapping[str, float] | None = None,
) -> None:
    """Write the checkpoint of a run's first `step` steps.

    `scaler` is fp16's, or None; `measured` on held-out records, for the model card.

    Raises:
        TrainingError: the disk is full or read-only; the message names the newest checkpoint.
    """
    assert run.folder is not None
    target = path_of(run.folder, step)
    state = {
        "step": step,
        "stage": run.stage.name,
        "settings": asdict(run.settings),
        "identity": _identity(run),
        "optimiser": trained.optimiser,
        "scaler": scaler.state_dict() if scaler else {},
    }
    try:
        with replacing_folder(target) as partial:
            provenance = f"{run.provenance}; stage {run.stage.name}, {step} steps"
            stage = trained_stage(run, step, measured or {})
            _write_weights(run, trained.parts, provenance, stage, partial / WEIGHTS)
            state["weights"] = identity.of_file(partial / WEIGHTS)
            if trained.averages:
                note = f"{provenance}, moving average of {trained.decay}"
                stage |= {"moving_average": trained.decay}
                _write_weights(run, trained.averages, note, stage, partial / EMA)
                state["ema"] = identity.of_file(partial / EMA)
            torch.save(state, partial / STATE)
    # PyTorch says that a disk is full with a RuntimeError.
    except (OSError, RuntimeError, weights.WeightsError) as error:
        raise TrainingError(
            f"Cannot write {target} ({error}). Earlier checkpoints are whole, the newest is "
            f"{newest_name(run.folder)}. Free disk space and start the same command again; "
            "it continues from there."
        ) from error


def remove_old(run: TrainingRun, best: Validated | None = None, is_average: bool = False) -> None:
    """Remove all checkpoints but the latest ones and the best one, which best.json then names.

    Args:
        best: that of the lowest validation loss, None where there is none or none is kept.
        is_average: that loss is the moving average's.
    """
    assert run.folder is not None
    kept = None
    if best:
        kept = path_of(run.folder, best.step)
        facts = {
            "checkpoint": kept.name,
            "file": EMA if is_average else WEIGHTS,
            "step": best.step,
            "validation_loss": best.loss,
        }
        # A disk that is full is told by what is written next.
        with suppress(OSError):
            write_text(run.folder / BEST, json.dumps(facts, indent=1) + "\n")
    for old in _all(run.folder)[: -run.settings.keep]:
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)


def trained_stage(
    run: TrainingRun, step: int, measured: Mapping[str, float] | None = None
) -> TrainedStage:
    """What a model card says of the run's first `step` steps.

    Args:
        measured: the loss on held-out records.
    """
    settings = run.settings
    stage = {
        "stage": run.stage.name,
        "parts": list(run.stage.parts),
        "steps": step,
        "batch_size": settings.batch_size,
        "samples": step * settings.batch_size,
        "rates": dict(run.stage.rates),
        "precision": "fp32" if settings.precision == "no" else settings.precision,
        "data": dict(run.data),
    }
    if measured:
        finite = {name: value for name, value in measured.items() if math.isfinite(value)}
        stage["validation"] = finite
    return stage


def _write_weights(
    run: TrainingRun,
    parts: Mapping[str, Tensors],
    provenance: str,
    stage: TrainedStage,
    path: Path,
) -> None:
    """Write the trained parts as a file that can be read by itself."""
    metadata = weights.header(parts, run.architecture, licence=run.licence, provenance=provenance)
    metadata |= trained_stages.header([*run.earlier, stage])
    weights.save(path, weights.flat(parts), metadata)


def refuse_another_run(run: TrainingRun) -> None:
    """Raise TrainingError if a run's folder holds another run; nothing is loaded.

    A checkpoint that cannot be read says nothing: `resume` tells what is wrong with it.
    """
    for checkpoint in reversed(_all(run.folder)):
        try:
            state = read_state(checkpoint, mapped=True)
        except UNREADABLE:
            continue
        _check_same(run, state)
        return


def resume(
    run: TrainingRun, optimiser: torch.optim.Optimizer, average: MovingAverage | None = None
) -> Resumed:
    """Load the newest whole checkpoint into modules, optimiser and moving average.

    Raises:
        TrainingError: the folder holds a run with other settings, or no checkpoint is whole.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(_all(run.folder)):
        try:
            state = read_state(checkpoint)
            parts = _verified_parts(checkpoint / WEIGHTS, state.get("weights"))
            averages = {}
            if average and "ema" in state:
                averages = _verified_parts(checkpoint / EMA, state["ema"])
        except UNREADABLE as error:
            damaged[checkpoint] = f"{error}" or type(error).__name__
            continue
        _check_same(run, state)
        _load(run, optimiser, parts, state)
        if average:
            average.load(averages)
        return Resumed(state["step"], state["scaler"], damaged, _sentences(checkpoint, state))
    if damaged:
        raise TrainingError(
            f"No checkpoint in {run.folder} is whole: {_in_words(damaged)}. Give another folder "
            "to start anew, or delete this one."
        )
    return Resumed()


def _load(run: TrainingRun, optimiser: torch.optim.Optimizer, parts: dict, state: dict) -> None:
    """Put a checkpoint into modules and optimiser."""
    try:
        for part in run.stage.parts:
            module = run.modules[part]
            current = module.state_dict()
            own = {}
            for name, value in parts[part].items():
                own[name] = fsdp.piece(value, current.get(name, value))
            module.load_state_dict(own)
        optimiser.load_state_dict(_own_state(optimiser, state["optimiser"]))
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(
            f"The checkpoint of step {state['step']} in {run.folder} does not fit the modules that "
            f"are trained ({error}). Give the same --base files, or another folder to start anew."
        ) from error


def _own_state(optimiser: torch.optim.Optimizer, state: dict) -> dict:
    """What this process keeps of an optimiser's whole state."""
    parameters = []
    for group in optimiser.param_groups:
        parameters += group["params"]
    own: dict[int, dict] = {}
    for number, values in state["state"].items():
        own[number] = {}
        for name, value in values.items():
            is_tensor = isinstance(value, torch.Tensor)
            own[number][name] = fsdp.piece(value, parameters[number]) if is_tensor else value
    return {**state, "state": own}


def set_aside(run: TrainingRun, resumed: Resumed) -> None:
    """Rename the damaged checkpoints that a run does not go on from, and say so."""
    for path in resumed.damaged:
        aside = path.with_name(path.name.replace("checkpoint", "damaged"))
        try:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as error:
            raise TrainingError(
                f"{path} is damaged and cannot be renamed ({error}). Delete it and start the same "
                "command again."
            ) from error
    if resumed.damaged:
        print(
            f"{_in_words(resumed.damaged)}. The run goes on from step {resumed.step}, its newest "
            "whole checkpoint; the damaged one is kept as damaged-*.",
            flush=True,
        )
    for sentence in resumed.sentences:
        print(sentence, flush=True)


def _all(folder: Path | None) -> list[Path]:
    """A folder's checkpoints, the earliest first."""
    if folder is None:
        return []
    checkpoints = []
    for path in folder.glob("checkpoint-*"):
        if path.name.rpartition("-")[2].isdigit():
            checkpoints.append(path)
    return sorted(checkpoints)


def _verified_parts(path: Path, written: str | None) -> dict:
    """A checkpoint's weights by part; raises one of UNREADABLE unless they are as written.

    Args:
        written: the file's digest, None in a state that an older version wrote.
    """
    if written is not None and written != identity.of_file(path):
        raise ValueError(f"{path.name} has other bytes than were written")
    tensors, _ = weights.load_safetensors(str(path))
    parts, _ = weights.sort_keys(tensors)
    return parts


def _in_words(damaged: Mapping[Path, str]) -> str:
    return "; ".join(f"{path.name} is damaged ({reason})" for path, reason in damaged.items())


def _sentences(checkpoint: Path, state: dict) -> list[str]:
    """What is to be said of a checkpoint that a run goes on from."""
    if "identity" in state:
        return []
    return [
        f"{checkpoint.name} is of an older version, which did not write down rates, loss, weights "
        "and records. Whether they are the same as then cannot be told."
    ]


def _identity(run: TrainingRun) -> dict:
    """Everything besides stage and settings that a run's result follows from."""
    rates = {f"rate of {part}": rate for part, rate in run.stage.rates}
    return {**rates, **run.identity}


def _check_same(run: TrainingRun, state: dict) -> None:
    """Raise TrainingError, which names what differs, unless a state is of this run."""
    changes = _changes(run, state)
    if changes:
        raise TrainingError(
            f"{run.folder} holds another run ({'; '.join(changes)}). Give the same settings to "
            "continue it, or another folder to start anew."
        )
    if state["step"] > run.settings.steps:
        raise TrainingError(
            f"{run.folder} holds a run of {state['step']} steps, more than the "
            f"{run.settings.steps} that are asked for. Give at least {state['step']}, or another "
            "folder to start anew."
        )


def _changes(run: TrainingRun, state: dict) -> list[str]:
    """What differs between a run and the one that left this state, as far as it matters."""
    if state["stage"] != run.stage.name:
        return [f"stage was {state['stage']}, is {run.stage.name}"]
    fixed = {}
    for key, value in asdict(run.settings).items():
        if _is_fixed(key, run.settings):
            fixed[key] = value
    changes = identity.differences(state["settings"], fixed)
    return changes + identity.differences(state.get("identity", {}), _identity(run))


def _is_fixed(key: str, settings: Settings) -> bool:
    """Whether a run that goes on must keep this setting."""
    decays = settings.final_rate != 1  # by a cosine that ends with the last step
    return key in FIXED or (key == "steps" and decays)
