"""One training loop for every stage: deterministic batches, exact resumption, one process or many.

A batch depends on the step alone (see `samples.Source`), so a run that was killed continues with the batches and noise
that it would have seen. Checkpoints are folders written under a temporary name and renamed.
"""

import csv
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .. import weights
from ..config import Architecture
from ..errors import CatError
from .objectives import Batch, Terms
from .stages import Stage


class TrainingError(CatError):
    """Training cannot go on; the message says why, what is safe, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What a run does; the same settings resume it."""

    steps: int = 40_000  # the paper's
    batch_size: int = 128  # over all processes and accumulation steps, the paper's
    micro_batch_size: int = 8  # samples a process puts through the model at once
    warmup: int = 0  # steps over which the rates rise linearly
    final_rate: float = 1.0  # what is left of the rates at the end of their cosine decay; 1 = constant, as in the paper
    weight_decay: float = 0.01  # AdamW's default
    precision: str = "no"  # "no" (fp32), "bf16" or "fp16"
    seed: int = 0
    save_every: int = 500
    keep: int = 2  # complete checkpoints


def combine(objective, terms: Terms, totals: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A part's share of the global batch's loss: sum over terms of sum(numbers) / (total weight + extra)."""
    return sum(terms[name].sum() / (totals[name] + objective.extra[name]) for name in terms)


def train(
    stage: Stage,
    objective: nn.Module,
    modules: Mapping[str, nn.Module],
    source: Callable[[int, range], Batch],
    folder: Path | None,
    settings: Settings,
    architecture: Architecture,
    *,
    provenance: str,
    licence: str,
    cpu: bool = False,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None,
) -> Path | None:
    """Train until `settings.steps`, from the newest complete checkpoint in `folder` if there is one.

    Args:
        objective: see objectives.py; holds the modules.
        modules: part name -> module, for all parts that the stage trains.
        source: (step, positions in the global batch) -> batch.
        folder: for checkpoints and log; without one nothing is written, and the trained modules are the result.
        cpu: do not use a GPU even if there is one.
        on_step: called in the main process after each step, with the number of steps done and their figures; what it
            raises ends the run between two steps.
    Returns:
        the CAT weights file of the last checkpoint, None without a folder.
    Raises:
        TrainingError: loss not finite, disk full, or settings that do not fit the folder.
    """
    accelerator = _accelerator(settings, cpu)
    if settings.batch_size % (settings.micro_batch_size * accelerator.num_processes):
        raise TrainingError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size "
            f"{settings.micro_batch_size} times {accelerator.num_processes} processes. Change one of them."
        )
    for part, module in modules.items():
        module.requires_grad_(part in dict(stage.rates)).train(part in dict(stage.rates))
    groups = [
        {"params": list(modules[part].parameters()), "lr": rate, "rate": rate}
        for part, rate in stage.rates
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    first = _resume(folder, stage, settings, modules, optimiser) if folder else 0
    model, prepared = accelerator.prepare(objective, optimiser)
    if accelerator.scaler is not None and first:
        accelerator.scaler.load_state_dict(_state(_newest(folder))["scaler"])
    log = (
        Log(folder / "log.csv", first, settings) if folder and accelerator.is_main_process else None
    )

    def save(step):
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _save(
                folder,
                step,
                stage,
                settings,
                modules,
                optimiser,
                accelerator.scaler,
                architecture,
                provenance,
                licence,
            )
        accelerator.wait_for_everyone()

    with _Interrupt() as interrupt:
        for step in range(first, settings.steps):
            start = time.monotonic()
            figures = _step(step, accelerator, model, objective, prepared, source, settings)
            if not math.isfinite(figures["loss"]):
                newest = folder and _newest(folder)
                raise TrainingError(
                    f"The loss of step {step + 1} is {figures['loss']}. Nothing was overwritten; the newest "
                    f"good checkpoint is {newest.name if newest else 'none yet'}. Lower the rates, warm up "
                    "longer, or use bf16 instead of fp16."
                )
            figures["images_per_second"] = settings.batch_size / (time.monotonic() - start)
            if log:
                log.add(step + 1, figures)
            stop = (
                accelerator.reduce(
                    torch.tensor(float(interrupt.asked), device=accelerator.device)
                ).item()
                > 0
            )
            if folder and (
                (step + 1) % settings.save_every == 0 or step + 1 == settings.steps or stop
            ):
                save(step + 1)
            if accelerator.is_main_process:
                on_step(step + 1, figures)
            if stop:
                raise KeyboardInterrupt
    return folder and _newest(folder) / "weights.safetensors"


def require_accelerate() -> None:
    """Raise TrainingError unless this Python has what the loop is built on."""
    try:
        import accelerate
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"Training needs {error.name}, which this Python does not have. Install it with: "
            f'"{sys.executable}" -m pip install "accelerate>=1.0"'
        ) from error


def _accelerator(settings: Settings, cpu: bool):
    require_accelerate()
    from accelerate import Accelerator, DistributedDataParallelKwargs

    return Accelerator(
        cpu=cpu,
        mixed_precision=settings.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )  # the diffusion stages leave post_layernorm alone


def _step(step, accelerator, model, objective, optimiser, source, settings) -> dict[str, float]:
    """One optimiser step over the global batch; returns its loss, terms and watched means."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = settings.batch_size // processes
    starts = range(rank * share, (rank + 1) * share, settings.micro_batch_size)
    batches = [source(step, range(start, start + settings.micro_batch_size)) for start in starts]
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, weight in objective.weights(batch).items():
            totals[name] = totals.get(name, 0) + weight.sum().to(accelerator.device)
    totals = {name: accelerator.reduce(total) for name, total in totals.items()}

    sums: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(batches):
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(model):
            with accelerator.autocast():
                terms, watched = model(batch)
            loss = combine(objective, terms, totals)
            accelerator.backward(loss * processes)  # processes' gradients are averaged
        values = {
            "loss": loss,
            **{
                name: value.sum() / (totals[name] + objective.extra[name])
                for name, value in terms.items()
            },
        }
        for name, value in watched.items():  # rows without a mask have nothing to watch
            values |= {name: value.nansum(), f"{name} rows": (~value.isnan()).sum()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
    figures = {name: accelerator.reduce(value).item() for name, value in sums.items()}
    for name in [name for name in figures if f"{name} rows" in figures]:
        figures[name] /= max(figures.pop(f"{name} rows"), 1)
    if math.isfinite(figures["loss"]):
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * _rate(step, settings)
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return figures


def _rate(step: int, settings: Settings) -> float:
    """Share of the stage's rates: a linear rise, times a cosine from 1 to `final_rate`."""
    decay = (1 + math.cos(math.pi * step / settings.steps)) / 2
    return min(1.0, (step + 1) / max(settings.warmup, 1)) * (
        settings.final_rate + (1 - settings.final_rate) * decay
    )


# Checkpoints: <folder>/checkpoint-00000500/{weights.safetensors, state.pt} ---------------------------------------------


def _newest(folder: Path) -> Path | None:
    complete = sorted(
        path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()
    )
    return complete[-1] if complete else None


def _state(checkpoint: Path) -> dict:
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def _save(
    folder, step, stage, settings, modules, optimiser, scaler, architecture, provenance, licence
) -> None:
    target = folder / f"checkpoint-{step:08d}"
    partial = folder / f"{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        parts = {part: modules[part].state_dict() for part, _ in stage.rates}
        metadata = weights.header(
            parts,
            architecture,
            licence=licence,
            provenance=f"{provenance}; stage {stage.name}, {step} steps",
        )
        weights.save(partial / "weights.safetensors", weights.flat(parts), metadata)
        torch.save(
            {
                "step": step,
                "stage": stage.name,
                "settings": asdict(settings),
                "optimiser": optimiser.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
            },
            partial / "state.pt",
        )
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except (OSError, RuntimeError, weights.WeightsError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = _newest(folder)
        raise TrainingError(
            f"Cannot write {target} ({error}). Earlier checkpoints are whole, the newest is "
            f"{newest.name if newest else 'none yet'}. Free disk space and start the same command again; "
            "it continues from there."
        ) from error
    for old in sorted(folder.glob("checkpoint-*"))[: -settings.keep]:
        shutil.rmtree(old, ignore_errors=True)


def _resume(folder: Path, stage: Stage, settings: Settings, modules, optimiser) -> int:
    """Load the newest checkpoint into modules and optimiser; returns the step to go on with."""
    newest = _newest(folder)
    if newest is None:
        return 0
    state = _state(newest)
    fixed = {"batch_size", "warmup", "final_rate", "weight_decay", "precision", "seed"}
    fixed |= {"steps"} if settings.final_rate != 1 else set()  # the decay depends on them
    changed = [
        f"{key} was {state['settings'][key]}, is {value}"
        for key, value in asdict(settings).items()
        if key in fixed and state["settings"].get(key, value) != value
    ]
    if state["stage"] != stage.name:
        changed.insert(0, f"stage was {state['stage']}, is {stage.name}")
    if changed:
        raise TrainingError(
            f"{folder} holds another run ({'; '.join(changed)}). Give the same settings to continue it, "
            "or another folder to start anew."
        )
    parts, _ = weights.sort_keys(weights.load_safetensors(str(newest / "weights.safetensors"))[0])
    for part, _ in stage.rates:
        modules[part].load_state_dict(parts[part])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


class _Interrupt:
    """Turn Ctrl-C and SIGTERM into a wish to stop after the step; a second one stops at once."""

    asked = False

    def __enter__(self):
        self.previous = {}
        for name in ("SIGINT", "SIGTERM"):
            try:
                self.previous[name] = signal.signal(getattr(signal, name), self._ask)
            except ValueError:
                pass  # not the main thread: the caller has its own way to stop
        return self

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(
            "\nStopping after this step; the run will be saved. Press Ctrl-C again to stop at once.",
            flush=True,
        )

    def __exit__(self, *_):
        for name, handler in self.previous.items():
            signal.signal(getattr(signal, name), handler)


class Log:
    """A CSV line a step; a resumed run drops the lines after its checkpoint first."""

    def __init__(self, path: Path, first: int, settings: Settings):
        self.path, self.steps, self.batch_size = path, settings.steps, settings.batch_size
        self.done, self.start = first, time.monotonic()
        self.first = first
        rows = []
        if path.exists() and first:
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file)]
            rows = rows[:1] + [
                row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= first
            ]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", newline="") as file:
            csv.writer(file).writerows(rows)
        os.replace(partial, path)
        self.header = bool(rows)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if not self.header:
                writer.writerow(["step", *figures])
                self.header = True
            writer.writerow([step, *figures.values()])
        self.done = step
        left = (time.monotonic() - self.start) / (step - self.first) * (self.steps - step)
        shown = "  ".join(
            f"{name} {figures[name]:.4g}"
            for name in ("loss", "cosine_observed", "cosine")
            if name in figures
        )
        print(
            f"\r{step}/{self.steps}  {shown}  {figures['images_per_second']:.1f} images/s  "
            f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left ",
            end="",
            flush=True,
        )
