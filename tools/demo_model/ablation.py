"""The paper's ablation in small: three rows trained at equal budget on drawn scenes, and measured.

    python tools/run.py demo_model.ablation [--work runs/ablation]

Row 1 is the inpainting U-Net alone, row 2 adds RefAdapter with a visual prompt from the masked
picture, row 3 lets SemInpainter predict it (CAT-Diffusion). CLIP and VAE are the demo model's;
U-Net, RefAdapter and SemInpainter start from nothing. Writes table.md, measured.json, report/,
histogram-*.png and seeds-*.png into the folder. The same command continues.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.evaluation.results import SampleSet
from cat_diffusion.cat_core.files import replacing_folder
from cat_diffusion.cat_core.pictures.tensors import channels_last, to_levels
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.load import Models
from cat_diffusion.nodes.visual_prompt import encode_visual_prompt, predict
from comfyui import ROOT, launch
from demo_model import ablation_table, networks, scenes, score
from demo_model.ablation_rows import (
    BATCH,
    CASCADE_RATE,
    HOLES,
    INPAINTING,
    OWN_PHASES,
    ROWS,
    SCENES,
    SEEDS,
    SEM_INPAINTER_PHASE,
    SHARED_PHASE,
    WITH_REF_ADAPTER,
    AblationRow,
    Phase,
    checkpoint,
    frozen,
    phase_folder,
    results_folder,
    test_manifest,
    test_set,
)
from demo_model.demo_stages import fresh_networks, newest, train_stage

WORK = ("train", "sample", "measure")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/ablation", help="folder for all that is made"
    )
    parser.add_argument("--only", choices=WORK, nargs="+", default=WORK)
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
    launch.limit_threads(arguments.threads)
    arguments.cpu = arguments.cpu or not launch.has_gpu()
    rows = [ROWS[number - 1] for number in arguments.rows]
    try:
        if "train" in arguments.only:
            train(rows, arguments)
        if "sample" in arguments.only:
            sample(rows, arguments)
        if "measure" in arguments.only:
            ablation_table.measure(arguments.work, arguments.shorter)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.")
        return 130
    except CatError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


# Training -----------------------------------------------------------------------------------------


def train(rows: Sequence[AblationRow], arguments) -> None:
    """What all rows share, then the rows, each from the same weights."""
    work = arguments.work
    if not (work / "scenes/manifest.jsonl").exists():
        scenes.write(work / "scenes", scenes.TRAIN[: SCENES // arguments.shorter])
    base = [fresh_networks(work), frozen(work)]
    shared = work / "shared"
    _train_phase("unet", shared, SHARED_PHASE, base, arguments)
    for row in rows:
        before = [*base, newest(shared)]
        if row.has_sem_inpainter:
            folder = work / "sem-inpainter"
            _train_phase("sem-inpainter", folder, SEM_INPAINTER_PHASE, base, arguments)
            before.append(newest(folder))
        for number, phase in enumerate(OWN_PHASES):
            folder = phase_folder(row, number, work)
            _train_phase(row.stages[number], folder, phase, before, arguments)
            before.append(newest(folder))


def _train_phase(stage: str, folder: Path, phase: Phase, base: Sequence[Path], arguments) -> None:
    """Train a stage's own parts, by tools/train.py's code, unless that is done."""
    steps = phase.steps // arguments.shorter
    print(f"\n== {folder.name}: {stage}, {steps} steps", flush=True)
    rates = []
    for part, _ in STAGES[stage].rates:
        in_cascade = part == "sem_inpainter" and stage == "cascade"
        rates.append((part, CASCADE_RATE if in_cascade else phase.rate))
    train_stage(
        replace(STAGES[stage], rates=tuple(rates)),
        folder,
        base=base,
        work=arguments.work,
        steps=max(steps, 1),
        batch_size=BATCH,
        final_rate=phase.final_rate,
        cpu=arguments.cpu,
    )


# Sampling -----------------------------------------------------------------------------------------


def sample(rows: Sequence[AblationRow], arguments) -> None:
    """Every row fills every test hole with every seed; a folder that is there is complete."""
    manifest = test_manifest(arguments.work, arguments.shorter)
    for row in rows:
        with torch.inference_mode():
            models = score.load(checkpoint(row, arguments.work))
        for hole in HOLES:
            samples = test_set(manifest, hole)
            for seed in SEEDS:
                folder = results_folder(arguments.work, row, hole, seed)
                if not folder.exists():
                    _fill(models, row, samples, seed, folder)


def _fill(models: Models, row: AblationRow, samples: SampleSet, seed: int, folder: Path) -> None:
    """One row's pictures of one kind of hole with one seed, in the layout of tools/generate.py."""
    start = time.monotonic()
    labels = [record.label for record in samples.records]
    with replacing_folder(folder) as partial:
        for place, indices in enumerate(score.batches_of_one_label(labels)):
            opened = [samples.sample(samples.records[index]) for index in indices]
            image = channels_last(each.picture for each in opened)
            hole = channels_last(each.hole for each in opened)
            label = labels[indices[0]]
            sampling = score.Sampling(seed=1000 * seed + place)
            with torch.inference_mode():
                patched = _patched(models, row, image, hole, label)
                pictures = score.sample(
                    models, patched, image, hole, label, sampling, from_noise=True
                )
            for each, picture in zip(opened, to_levels(pictures).numpy(), strict=True):
                Image.fromarray(picture).save(partial / f"{each.record.id}.png")
        described = {
            "manifest": str(samples.manifest),
            "split": samples.split,
            "hole": samples.hole,
            "size": networks.SIZE,
            "workflow": f"row {row.number}",
            "seed": seed,
        }
        (partial / "run.json").write_text(json.dumps(described))
    seconds = time.monotonic() - start
    print(f"{folder.name}: {len(labels)} pictures in {seconds:.0f} s", flush=True)


def _patched(models: Models, row: AblationRow, image: torch.Tensor, mask: torch.Tensor, label: str):
    """A row's MODEL for these pictures: as it is, or with a RefAdapter that looks at its prompt."""
    if row is INPAINTING:
        return models.model
    if row is WITH_REF_ADAPTER:
        prompt = encode_visual_prompt(models.clip_vision, image, mask)
    else:
        prompt = predict(models.cat_model, models.clip_vision, models.clip, image, mask, label)
    return apply_ref_adapter(models.model, models.cat_model, prompt)
