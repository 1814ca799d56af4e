"""Let the demo model fill held-out holes through the pack's nodes, and an independent judge look.

    python tools/run.py demo_model.score [--checkpoint FILE] [--count 500] [--sheet sheet.png]

The judge (classifier.py) is trained on first use, on scenes of its own, and kept in the cache.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cat_diffusion.cat_core.files import replacing
from cat_diffusion.cat_core.pictures.tensors import channels_last, to_levels
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import sampling as host_sampling
from cat_diffusion.nodes.load import Models, load_full_checkpoint
from cat_diffusion.nodes.visual_prompt import predict
from comfyui import ROOT, install, launch
from demo_model import classifier, scenes

AT_ONCE = 16  # pictures
_ACROSS = 4  # holes side by side on a contact sheet
_CAPTION = 14  # pixels, height of the label below each


@dataclass(frozen=True)
class Sampling:
    """KSampler's numbers; sampler and scheduler are the paper's."""

    steps: int = 20
    cfg: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class FilledHole:
    """A scene, one of its holes, and what was made of it: (S, S, 3) uint8."""

    scene: scenes.Scene
    kind: str
    picture: np.ndarray


def main() -> int:
    default = Sampling()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "models/cat_demo_model.safetensors"
    )
    parser.add_argument(
        "--count", type=int, default=500, help="holes of each kind, from the test scenes"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=100,
        help="holes of each kind whose shape and colour never met in training",
    )
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--cfg", type=float, default=default.cfg)
    parser.add_argument("--strength", type=float, default=1.0, help="of the RefAdapter")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the noise")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write a contact sheet of the first 32 holes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the rates")
    arguments = parser.parse_args()
    launch.limit_threads(arguments.threads)
    evaluate(arguments)
    return 0


def evaluate(arguments) -> None:
    """Print, and write, the share of holes in which the judge sees the named object."""
    with torch.inference_mode():
        models = load(arguments.checkpoint)
    judge = the_judge()
    sampling = Sampling(arguments.steps, arguments.cfg, arguments.seed)
    start = time.monotonic()
    rates = {}
    shown = []
    for title, seeds in (
        ("test", scenes.TEST[: arguments.count]),
        ("held-out", scenes.HELD_OUT_TEST[: arguments.held_out]),
    ):
        drawn = [scenes.scene(seed) for seed in seeds]
        if not drawn:
            continue
        labels = [scene.label for scene in drawn]
        for kind in ("box", "exact"):
            made = inpaint(models, drawn, labels, kind, sampling, arguments.strength)
            rate = _rate(judge, drawn, made)
            print(
                f"{title:>9} {kind:<6}{len(drawn):5} holes: {rate['right']:7.1%} right "
                f"(shape {rate['shape']:.1%}, colour {rate['colour']:.1%}), "
                f"{time.monotonic() - start:.0f} s so far",
                flush=True,
            )
            rates[f"{title} {kind}"] = rate
            for scene, picture in zip(drawn[:16], made, strict=False):
                shown.append(FilledHole(scene, kind, picture))
    if arguments.sheet:
        contact_sheet(shown).save(arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(rates, indent=1) + "\n")


def _rate(
    judge: classifier.SceneClassifier, drawn: Sequence[scenes.Scene], made: np.ndarray
) -> dict[str, float]:
    """How many holes there are, and the shares in which the judge sees what was asked for."""
    verdict = classifier.judge(judge, made, np.array([scene.box for scene in drawn]))
    shape = verdict.shape == [scenes.SHAPES.index(scene.shape) for scene in drawn]
    colour = verdict.colour == [scenes.COLOUR_NAMES.index(scene.colour) for scene in drawn]
    return {
        "holes": len(drawn),
        "right": float((shape & colour).mean()),
        "shape": float(shape.mean()),
        "colour": float(colour.mean()),
    }


def load(checkpoint: Path) -> Models:
    """The outputs of CAT Load Checkpoint."""
    return load_full_checkpoint(checkpoint)


def inpaint(
    models: Models,
    drawn: Sequence[scenes.Scene],
    labels: Sequence[str],
    kind: str,
    sampling: Sampling,
    strength: float = 1.0,
) -> np.ndarray:
    """Fill the holes of scenes with the named objects.

    The nodes get the scene without its target: KSampler starts from the photo's latent, in which
    the target would shine through.

    Args:
        kind: of the holes, see scenes.holes.
        strength: of the RefAdapter.

    Returns:
        (B, S, S, 3) uint8, untouched outside the holes.
    """
    made: list = [None] * len(drawn)
    for indices in batches_of_one_label(labels):
        image = channels_last(drawn[index].without for index in indices)
        mask = channels_last(scenes.holes(drawn[index], kind) for index in indices)
        label = labels[indices[0]]
        of_batch = replace(sampling, seed=sampling.seed + 1000 * indices[0])
        with torch.inference_mode():
            prompt = predict(models.cat_model, models.clip_vision, models.clip, image, mask, label)
            patched = apply_ref_adapter(models.model, models.cat_model, prompt, strength)
            pictures = sample(models, patched, image, mask, label, of_batch)
        for index, picture in zip(indices, to_levels(pictures).numpy(), strict=True):
            made[index] = picture
    return np.stack(made)


def batches_of_one_label(labels: Sequence[str]) -> list[list[int]]:
    """The places of equal labels together, AT_ONCE at most: the nodes take one text a batch."""
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    batches = []
    for group in places.values():
        for start in range(0, len(group), AT_ONCE):
            batches.append(group[start : start + AT_ONCE])
    return batches


def sample(
    models: Models,
    patched,
    image: torch.Tensor,
    mask: torch.Tensor,
    label: str,
    sampling: Sampling,
    *,
    from_noise: bool = False,
) -> torch.Tensor:
    """The rest of the workflow with a patched model; the photo stays outside the hole.

    Args:
        patched: MODEL.
        image: IMAGE (B, S, S, 3) in [0, 1].
        mask: MASK (B, S, S), 1 = repaint.
        from_noise: start from noise alone instead of adding it to the photo's own latent.
    """
    positive = host_sampling.encode_prompt(models.clip, label)
    negative = host_sampling.encode_prompt(models.clip, "")
    positive, negative, latent = inpaint_conditioning(positive, negative, models.vae, image, mask)
    if from_noise:
        latent = latent | {"samples": torch.zeros_like(latent["samples"])}
    sampled = host_sampling.ksample(
        patched,
        seed=sampling.seed,
        steps=sampling.steps,
        cfg=sampling.cfg,
        positive=positive,
        negative=negative,
        latent=latent,
    )
    made = host_sampling.decode(models.vae, sampled).clamp(0, 1)
    return torch.where(mask[..., None] > 0.5, made, image)


def the_judge() -> classifier.SceneClassifier:
    """The independent classifier, trained on first use."""
    path = install.cache_dir() / "demo/judge.safetensors"
    if not path.exists():
        print("Training the judge, once ...", flush=True)
        model, _ = classifier.train(progress=True)
        with replacing(path) as partial:
            classifier.save(partial, model)
    return classifier.load(path)


def contact_sheet(shown: Sequence[FilledHole]) -> Image.Image:
    """Hole and result of each, four to a row, the label below."""
    size = len(shown[0].picture)
    height = size + _CAPTION
    rows = math.ceil(len(shown) / _ACROSS)
    sheet = Image.new("RGB", (_ACROSS * 2 * size, rows * height), "black")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default_imagefont()
    for number, filled in enumerate(shown):
        row, column = divmod(number, _ACROSS)
        x = column * 2 * size
        y = row * height
        hole = scenes.holes(filled.scene, filled.kind)[..., None] > 127
        hidden = np.where(hole, np.uint8(255), filled.scene.image)
        sheet.paste(Image.fromarray(hidden), (x, y))
        sheet.paste(Image.fromarray(filled.picture), (x + size, y))
        title = f"{filled.scene.label}, {filled.kind}"
        pen.text((x + 3, y + size + 1), title, fill="white", font=font)
    return sheet
