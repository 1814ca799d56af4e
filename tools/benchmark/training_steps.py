"""The section of tools/bench.py on training.

It runs tools/train.py's own loop on copies of the demo's photograph.
"""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.batches import default_workers
from cat_diffusion.cat_core.training.encoding import Preparation
from cat_diffusion.cat_core.training.settings import Settings, TrainingRun
from cat_diffusion.cat_core.training.stages import STAGES
from comfyui import ROOT
from training import stage_parts

from . import training_samples
from .rows import Row, rows_in_turn


class MeasuredStep(NamedTuple):
    """What one step took."""

    seconds: float
    waiting: float  # share of it that was spent waiting for samples


def training(arguments) -> Iterator[Row]:
    """Seconds of a step of one picture, fp32, with encoding and from the cache; then samples."""
    count = arguments.training_steps + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_samples(folder, count)
        for stage in ("sem-inpainter", "ref-adapter"):
            encoding = f"{stage}, with encoding"
            cached = f"{stage}, from the cache"
            steps = {
                encoding: _steps(arguments, stage, folder, count),
                cached: _steps(arguments, stage, folder, count, cache=folder / stage),
            }
            seconds = {form: [each.seconds for each in steps[form]] for form in steps}
            yield from rows_in_turn(seconds, encoding)
            yield Row(cached, "images/s", [1 / statistics.median(seconds[cached])])
            for form, measured in steps.items():
                waiting = [100 * each.waiting for each in measured]
                yield Row(f"{form}: waiting for samples", "% of a step", waiting)
        yield from training_samples.rows(folder, ("sem-inpainter", "ref-adapter"), arguments.size)
    yield from training_samples.memory_of_shards(arguments.shards)


def _write_samples(folder: Path, count: int) -> None:
    """A manifest that names the photograph `count` times."""
    for name in ("photo.jpg", "mask.png"):
        shutil.copy(ROOT / "web/photograph" / name, folder)
    records = []
    for number in range(count):
        record = manifest.Record(f"s{number}", "photo.jpg", label="spoon", mask="mask.png")
        records.append(record)
    manifest.write(folder / "manifest.jsonl", records)


def _steps(
    arguments, name: str, folder: Path, count: int, cache: Path | None = None
) -> list[MeasuredStep]:
    """Each step but the first, which warms up; worker processes prepare the samples."""
    stage = STAGES[name]
    settings = Settings(steps=count, batch_size=1, micro_batch_size=1)
    file = stage_parts.load([arguments.checkpoint], stage.diffusion)
    modules, objective = stage_parts.build(stage, file, checkpointing=True)
    encoders, store = stage_parts.encoded_samples(
        file,
        stage.objective,
        folder / "manifest.jsonl",
        size=arguments.size,
        cache=cache,
        how=Preparation(stage.objective, reads=stage.reads),
    )
    batches = stage_parts.batches_for(stage, encoders, store, settings, default_workers())
    steps = []

    def on_step(step, figures):
        steps.append(MeasuredStep(1 / figures["images_per_second"], figures["waiting"]))

    run = TrainingRun(stage, modules, objective, settings)
    loop.train(run, batches, cpu=arguments.cpu, on_step=on_step)
    return steps[1:]
