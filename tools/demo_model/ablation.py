"""The paper's ablation in small: three rows trained at equal budget on drawn scenes, sampled, measured.

    python tools/ablation.py [--work runs/ablation]

Row 1 is the inpainting U-Net alone, row 2 adds RefAdapter with a visual prompt from the masked picture, row 3 lets
SemInpainter predict it (CAT-Diffusion). CLIP and VAE are the demo model's; U-Net, RefAdapter and SemInpainter start from
nothing. Writes table.md, measured.json, report/, histogram.png and seeds.png into the folder. The same command continues.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from comfyui import ROOT
from demo_model import recipe, score

DEMO_MODEL = ROOT / "models/cat_demo_model.safetensors"
SCENES, BATCH = 6_000, 32
# Every row's U-Net goes through the same steps at the same rates: shared ones first, then two phases of its own.
SHARED_STEPS, STEPS = 500, (800, 500)
RATES, FINAL_RATES = (1e-3, 3e-4), (0.3, 0.05)
SEM_INPAINTER_STEPS, SEM_INPAINTER_RATE, CASCADE_RATE = (
    1200,
    1e-3,
    5e-5,
)  # beside the rows' budget, as in the paper
TEST_HOLES, HOLES, SEEDS, AT_ONCE = 500, ("box", "segment"), (0, 1, 2), 16


@dataclass(frozen=True)
class Row:
    """A row of the table: the stage of each of its phases."""

    name: str
    stages: tuple[str, str]


ROWS = (
    Row("inpainting", ("unet", "unet")),
    Row("+ RefAdapter", ("ref-adapter-observed", "ref-adapter-observed")),
    Row("+ SemInpainter", ("ref-adapter-unet", "cascade")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/ablation", help="folder for all that is made"
    )
    parser.add_argument(
        "--only",
        choices=("train", "sample", "measure"),
        nargs="+",
        default=("train", "sample", "measure"),
    )
    parser.add_argument(
        "--rows",
        type=int,
        choices=(1, 2, 3),
        nargs="+",
        default=(1, 2, 3),
        help="rows to train and sample",
    )
    parser.add_argument(
        "--shorter",
        type=int,
        default=1,
        metavar="N",
        help="an Nth of all steps, scenes and holes, to try it out",
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    arguments = parser.parse_args()
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.cpu = arguments.cpu or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    from cat_diffusion.cat_core.data.manifest import ManifestError
    from cat_diffusion.cat_core.evaluation.metrics import EvaluationError
    from cat_diffusion.cat_core.training.loop import TrainingError
    from cat_diffusion.cat_core.weights import WeightsError

    try:
        if "train" in arguments.only:
            train(arguments)
        if "sample" in arguments.only:
            sample(arguments)
        if "measure" in arguments.only:
            from demo_model import ablation_table

            ablation_table.measure(arguments)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.")
        return 130
    except (TrainingError, EvaluationError, ManifestError, WeightsError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


# Training -----------------------------------------------------------------------------------------------------------


def train(arguments) -> None:
    """What all rows share, then the rows, each from the same weights."""
    from demo_model import scenes

    work, shorter = arguments.work, arguments.shorter
    if not (work / "scenes/manifest.jsonl").exists():
        scenes.write(work / "scenes", scenes.TRAIN[: SCENES // shorter])
    base = [recipe.fresh_networks(work), frozen(work)]
    _phase("unet", "shared", base, SHARED_STEPS, {"unet": RATES[0]}, 1.0, arguments)
    for number in arguments.rows:
        row, before = ROWS[number - 1], [*base, recipe.newest(work / "shared")]
        if "cascade" in row.stages:
            _phase(
                "sem-inpainter",
                "sem-inpainter",
                base,
                SEM_INPAINTER_STEPS,
                {"sem_inpainter": SEM_INPAINTER_RATE},
                0.02,
                arguments,
            )
            before.append(recipe.newest(work / "sem-inpainter"))
        for phase, (stage, steps, rate, final) in enumerate(
            zip(row.stages, STEPS, RATES, FINAL_RATES)
        ):
            rates = {"unet": rate, "ref_adapter": rate, "sem_inpainter": CASCADE_RATE}
            run = f"row{number}-{'ab'[phase]}"
            _phase(stage, run, before, steps, rates, final, arguments)
            before.append(recipe.newest(work / run))


def frozen(work: Path) -> Path:
    """The demo model's CLIP and VAE in a file of their own."""
    from cat_diffusion.cat_core import weights

    path = work / "frozen.safetensors"
    if not path.exists():
        file = weights.read(DEMO_MODEL)
        parts = {part: file.parts[part] for part in ("clip_text", "clip_vision", "vae")}
        weights.save(
            path,
            weights.flat(parts),
            weights.header(
                parts,
                file.architecture,
                licence=recipe.LICENCE,
                provenance="the demo model's CLIP and VAE",
            ),
        )
    return path


def _phase(
    stage: str, run: str, base, steps: int, rates: dict[str, float], final_rate: float, arguments
) -> None:
    """Train a stage's own parts at `rates`, by tools/train.py's code, unless that is done."""
    from cat_diffusion.cat_core.training.stages import STAGES

    print(f"\n== {run}: {stage}, {steps // arguments.shorter} steps", flush=True)
    own = replace(
        STAGES[stage], rates=tuple((part, rates[part]) for part, _ in STAGES[stage].rates)
    )
    recipe.train_stage(
        own,
        arguments.work / run,
        base,
        arguments.work,
        max(steps // arguments.shorter, 1),
        BATCH,
        final_rate,
        cpu=arguments.cpu,
    )


# Sampling -----------------------------------------------------------------------------------------------------------


def sample(arguments) -> None:
    """Every row fills every test hole with every seed; a folder that is there is complete."""
    import torch

    manifest = test_manifest(arguments)
    for number in arguments.rows:
        with torch.inference_mode():
            models = score.load(checkpoint(number, arguments.work))
        for hole in HOLES:
            for seed in SEEDS:
                folder = results_folder(arguments.work, number, hole, seed)
                if not folder.exists():
                    _fill(models, number, test_set(manifest, hole), seed, folder)


def checkpoint(number: int, work: Path) -> Path:
    """A row's file for CAT Load Checkpoint; the first two rows' SemInpainter is not trained and not asked."""
    from cat_diffusion.cat_core import weights

    path = work / f"row{number}.safetensors"
    if not path.exists():
        runs = [work / "sem-inpainter"] * (number == 3) + [work / f"row{number}-b"]
        file = weights.merge(
            [
                weights.read(path)
                for path in (recipe.fresh_networks(work), frozen(work), *map(recipe.newest, runs))
            ]
        )
        weights.save(
            path,
            weights.flat(file.parts),
            weights.header(
                file.parts,
                file.architecture,
                licence=recipe.LICENCE,
                provenance=f"ablation, row {number}: {ROWS[number - 1].name}",
            ),
        )
    return path


def test_manifest(arguments) -> Path:
    """The test scenes, written once."""
    from demo_model import scenes

    folder = arguments.work / "test"
    return (
        folder / "manifest.jsonl"
        if folder.exists()
        else scenes.write(folder, scenes.TEST[: TEST_HOLES // arguments.shorter])
    )


def results_folder(work: Path, number: int, hole: str, seed: int) -> Path:
    return work / "results" / f"row{number}-{hole}-seed{seed}"


def test_set(manifest: Path, hole: str):
    """The test set with one kind of hole."""
    from cat_diffusion.cat_core.evaluation.results import SampleSet
    from demo_model import networks

    return SampleSet(manifest, "test", hole, networks.SIZE).read()


def _fill(models, number: int, samples, seed: int, folder: Path) -> None:
    """One row's pictures of one kind of hole with one seed, in the layout of tools/generate.py."""
    import numpy as np
    import torch
    from PIL import Image

    from demo_model import networks

    partial, start = folder.with_name(f"{folder.name}.partial"), time.monotonic()
    partial.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list] = {}
    for record in samples.records:
        groups.setdefault(record.label, []).append(record)
    batches = [
        members[i : i + AT_ONCE]
        for members in groups.values()
        for i in range(0, len(members), AT_ONCE)
    ]
    for place, records in enumerate(batches):
        opened = [samples.sample(record) for record in records]
        image, hole = (
            torch.from_numpy(np.stack([np.asarray(getattr(s, name)) for s in opened])).float() / 255
            for name in ("picture", "hole")
        )
        with torch.inference_mode():
            pictures = score.sample(
                models,
                patched(models, number, image, hole, records[0].label),
                image,
                hole,
                records[0].label,
                score.STEPS,
                score.CFG,
                1000 * seed + place,
                from_noise=True,
            )
        for record, picture in zip(records, (pictures * 255).round().to(torch.uint8).numpy()):
            Image.fromarray(picture).save(partial / f"{record.id}.png")
    (partial / "run.json").write_text(
        json.dumps(
            {
                "manifest": str(samples.manifest),
                "split": samples.split,
                "hole": samples.hole,
                "size": networks.SIZE,
                "workflow": f"row {number}",
                "seed": seed,
            }
        )
    )
    partial.rename(folder)
    print(
        f"{folder.name}: {len(samples.records)} pictures in {time.monotonic() - start:.0f} s",
        flush=True,
    )


def patched(models, number: int, image, mask, label: str):
    """A row's model for these pictures: as it is, or with a RefAdapter that looks at the row's visual prompt."""
    from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
    from cat_diffusion.nodes.visual_prompt import encode_visual_prompt, predict

    model, clip, _, clip_vision, cat_model = models
    if number == 1:
        return model
    prompt = (
        encode_visual_prompt(clip_vision, image, mask)
        if number == 2
        else predict(cat_model, clip_vision, clip, image, mask, label)
    )
    return apply_ref_adapter(model, cat_model, prompt)
