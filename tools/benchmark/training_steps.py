"""The section of tools/bench.py on training.

It runs tools/train.py's own loop on copies of the demo's photograph.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.batches import PreparedSamples, default_workers, loader
from cat_diffusion.cat_core.training.settings import Settings, TrainingRun
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.cat_core.training.stores import FreshSamples
from comfyui import ROOT
from training import stage_run

from .rows import Row, rows_in_turn

AT_ONCE = 4  # samples that a worker hands over
REQUESTS = 17  # that are timed, the first of them not where workers start


def training(arguments) -> Iterator[Row]:
    """Seconds of a step of one picture, fp32, with encoding and from the cache."""
    count = arguments.training_steps + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_samples(folder, count)
        for stage in ("sem-inpainter", "ref-adapter"):
            encoding = f"{stage}, with encoding"
            cached = f"{stage}, from the cache"
            seconds = {
                encoding: _steps(arguments, stage, folder, count),
                cached: _steps(arguments, stage, folder, count, cache=folder / stage),
            }
            yield from rows_in_turn(seconds, encoding)
            yield Row(cached, "images/s", [1 / statistics.median(seconds[cached])])
        yield from _preparing(folder)


def _preparing(folder: Path) -> Iterator[Row]:
    """How fast pictures become samples at 512x512, on one core and by worker processes."""
    records = manifest.read(folder / "manifest.jsonl")
    for objective in ("distillation", "diffusion"):
        fresh = FreshSamples(records, folder, None, objective=objective)
        samples = PreparedSamples(fresh, AT_ONCE, seed=0)
        requests = [(step, range(AT_ONCE)) for step in range(REQUESTS)]
        seconds = []
        for request in requests:
            start = time.perf_counter()
            samples[request]
            seconds.append((time.perf_counter() - start) / AT_ONCE)
        yield Row(f"preparing a sample for {objective}, one core", "s", seconds)
        workers = 1
        while workers <= default_workers() + 1:
            prepared = iter(loader(samples, requests, workers))
            next(prepared)  # workers have started
            start = time.perf_counter()
            count = AT_ONCE * sum(1 for _ in prepared)
            rate = count / (time.perf_counter() - start)
            yield Row(f"preparing for {objective}, workers: {workers}", "samples/s", [rate])
            workers *= 2


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
) -> list[float]:
    """Seconds of each step but the first, which warms up."""
    stage = STAGES[name]
    settings = Settings(steps=count, batch_size=1, micro_batch_size=1)
    file = stage_run.load([arguments.checkpoint], stage.diffusion)
    modules, objective = stage_run.build(stage, file, checkpointing=True)
    encoders, store = stage_run.encoded_samples(
        file,
        stage.objective,
        folder / "manifest.jsonl",
        size=arguments.size,
        cache=cache,
    )
    batches = stage_run.batches_for(stage, encoders, store, settings)
    seconds = []

    def on_step(step, figures):
        seconds.append(1 / figures["images_per_second"])

    run = TrainingRun(stage, modules, objective, settings)
    loop.train(run, batches, cpu=arguments.cpu, on_step=on_step)
    return seconds[1:]
