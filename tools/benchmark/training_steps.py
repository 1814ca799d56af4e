"""The section of tools/bench.py on training.

It runs tools/train.py's own loop on copies of the demo's photograph.
"""

import shutil
import statistics
import tempfile
from pathlib import Path

from benchmark.rows import Row, rows_in_turn
from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.settings import Settings, TrainingRun
from cat_diffusion.cat_core.training.stages import STAGES
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
    stage = STAGES[name]
    settings = Settings(steps=count, batch_size=1, micro_batch_size=1)
    file = stage_run.load([arguments.checkpoint], stage.diffusion)
    modules, objective = stage_run.build(stage, file, checkpointing=True)
    encoders, store = stage_run.encoded_samples(
        file,
        stage.objective,
        folder / "manifest.jsonl",
        size=arguments.size,
        cache=folder / name if cached else None,
    )
    batches = stage_run.batches_for(stage, encoders, store, settings)
    seconds = []

    def on_step(step, figures):
        seconds.append(1 / figures["images_per_second"])

    run = TrainingRun(stage, modules, objective, settings)
    loop.train(run, batches, cpu=arguments.cpu, on_step=on_step)
    return seconds[1:]
