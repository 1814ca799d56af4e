"""The section of tools/bench.py on training: tools/train.py's own loop on copies of the demo's photograph."""

import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from benchmark.rows import Row, rows_in_turn
from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.training import loop, samples, start
from cat_diffusion.cat_core.training.objectives import (
    Diffusion,
    Distillation,
    stable_diffusion_schedule,
)
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
from comfyui import ROOT
from training import stage_run


def training(arguments):
    """Rows: seconds of a step of one picture, fp32, with encoding and from the cache."""
    count = arguments.training_steps + 1
    with tempfile.TemporaryDirectory() as folder:
        records = []
        for name in ("photo.jpg", "mask.png"):
            shutil.copy(ROOT / "tools/photograph" / name, folder)
        for i in range(count):
            records.append(manifest.Record(f"s{i}", "photo.jpg", label="spoon", mask="mask.png"))
        manifest.write(Path(folder, "manifest.jsonl"), records)
        for stage in ("sem-inpainter", "ref-adapter"):
            seconds = {
                f"{stage}, {how}": _steps(
                    arguments, stage, Path(folder), how == "from the cache", count
                )
                for how in ("with encoding", "from the cache")
            }
            encoding, cached = seconds
            yield from rows_in_turn(seconds, encoding)
            yield Row(
                f"{stage}, from the cache", "images/s", [1 / statistics.median(seconds[cached])]
            )


def _steps(arguments, name: str, folder: Path, cached: bool, count: int) -> list[float]:
    """Seconds of each step but the first."""
    stage, seconds = STAGES[name], []
    diffusion = stage.objective == "diffusion"
    file = stage_run.load([arguments.checkpoint], diffusion)
    modules = start.trainable_parts(file.architecture, file.parts, 0)
    encoders, store = stage_run.encoded_samples(
        file,
        stage.objective,
        folder / "manifest.jsonl",
        "train",
        arguments.size,
        folder / name if cached else None,
    )
    with torch.inference_mode():
        empty = encoders.context([""]) if diffusion else None
    if diffusion:
        modules["unet"] = trainable_unet(file)
        objective = Diffusion(
            Denoiser(modules["unet"], modules["ref_adapter"], True),
            stable_diffusion_schedule(),
            None,
            False,
        )
    else:
        objective = Distillation(modules["sem_inpainter"], False)
    source = samples.Source(store, 1, 0, empty)

    def encoded(step, positions):
        with torch.no_grad():
            return {
                key: value.clone() for key, value in source(step, positions).items()
            }  # free of inference mode

    loop.train(
        stage,
        objective,
        modules,
        encoded,
        None,
        loop.Settings(count, 1, 1),
        file.architecture,
        provenance="",
        licence="",
        cpu=arguments.cpu,
        on_step=lambda step, figures: seconds.append(1 / figures["images_per_second"]),
    )
    return seconds[1:]
