"""Let the demo model fill holes in held-out photographs through the pack's nodes; a judge looks.

python tools/run.py demo_model.world_score --world FOLDER [--count 500] [--sheet sheet.png]
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from cat_diffusion.cat_core.features import VisualPrompt
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import sampling as host_sampling
from cat_diffusion.nodes.load import Models, load_full_checkpoint
from cat_diffusion.nodes.visual_prompt import predict
from comfyui import ROOT, launch
from demo_model import world, world_judge

FIRST_SEED = 7_000_000  # of the test's pictures: neither the model's nor the judge's
AT_ONCE = 25  # pictures
_ACROSS = 5  # results side by side on a sheet
_SHOWN = 128  # pixels, side of each picture of a sheet
_CAPTION = 14  # pixels


@dataclass(frozen=True)
class Question:
    """A hole to fill.

    Attributes:
        photograph: (S, S, 3) in [0, 1], with all things but the target.
        hole: (S, S), 1 = repaint.
        thing: what belongs there.
        style: of the things around it.
        alone: there is nothing else whose style one could see.
    """

    photograph: torch.Tensor
    hole: torch.Tensor
    thing: int
    style: int
    alone: bool


@dataclass(frozen=True)
class Method:
    """How holes are filled."""

    language: int = 0
    strength: float = 1.0
    steps: int = 20
    cfg: float = 3.0
    seed: int = 0


def questions(
    scenery: world.World, count: int, kind: str, targets: str = "trained"
) -> list[Question]:
    """Holes, "box" or "blob", in photographs that no training saw; the same for the same count."""
    painter = world.Painter(scenery, np.flatnonzero(scenery.held_out), targets)
    asked: list[Question] = []
    for first in range(0, count, AT_ONCE):
        seed = FIRST_SEED + first
        pictures = painter.paint(AT_ONCE, seed)
        if kind == "box":
            holes = world.box_holes(pictures, np.random.default_rng(seed))
        else:
            holes = world.blob_holes(pictures, seed)
        for row in range(AT_ONCE):
            asked.append(
                Question(
                    photograph=rearrange(pictures.without[row], "c h w -> h w c").cpu(),
                    hole=holes[row, 0].cpu(),
                    thing=int(pictures.things[row, 0]),
                    style=int(pictures.style[row]),
                    alone=bool((pictures.things[row, 1:] < 0).all()),
                )
            )
    return asked[:count]


def answers(
    models: Models, names: Sequence[tuple[str, str]], asked: Sequence[Question], method: Method
) -> torch.Tensor:
    """The filled pictures (B, S, S, 3), through the pack's nodes and the host's KSampler."""
    made = []
    for first in range(0, len(asked), AT_ONCE):
        part = asked[first : first + AT_ONCE]
        texts = [names[question.thing][method.language] for question in part]
        made.append(_filled(models, part, texts, method, method.seed + first))
    return torch.cat(made)


@torch.inference_mode()
def _filled(
    models: Models, asked: Sequence[Question], texts: Sequence[str], method: Method, seed: int
) -> torch.Tensor:
    """One batch: each picture with its own text, so that KSampler is called once."""
    image = torch.stack([question.photograph for question in asked])
    mask = torch.stack([question.hole for question in asked])
    model = models.model
    if method.strength:
        prompts = []
        for row, text in enumerate(texts):
            one = slice(row, row + 1)
            prompts.append(
                predict(
                    models.cat_model, models.clip_vision, models.clip, image[one], mask[one], text
                )
            )
        model = apply_ref_adapter(model, models.cat_model, _together(prompts), method.strength)
    contexts = [host_sampling.encode_prompt(models.clip, text)[0] for text in texts]
    context = torch.cat([context for context, _ in contexts])
    _, values = contexts[0]
    values = {key: value for key, value in values.items() if key != "pooled_output"}
    negative = host_sampling.encode_prompt(models.clip, "")
    positive, negative, latent = inpaint_conditioning(
        [[context, values]], negative, models.vae, image, mask
    )
    sampled = host_sampling.ksample(
        model,
        seed=seed,
        steps=method.steps,
        cfg=method.cfg,
        positive=positive,
        negative=negative,
        latent=latent,
    )
    made = host_sampling.decode(models.vae, sampled).clamp(0, 1).cpu().float()
    return torch.where(mask[..., None] > 0.5, made, image)


def _together(prompts: Sequence[VisualPrompt]) -> VisualPrompt:
    """One visual prompt with a row for each of several."""
    rows = {}
    for field in fields(VisualPrompt):
        values = [getattr(prompt, field.name) for prompt in prompts]
        is_tensor = isinstance(values[0], torch.Tensor)
        rows[field.name] = torch.cat(values) if is_tensor else values[-1]
    return VisualPrompt(**rows)


def rates(
    judge: world_judge.NamingJudge, asked: Sequence[Question], made: torch.Tensor
) -> dict[str, float]:
    """The shares of holes with the right thing, and with the style of what stands around."""
    hole = torch.stack([question.hole for question in asked]).unsqueeze(1)
    things = np.array([question.thing for question in asked])
    styles = np.array([question.style for question in asked])
    alone = np.array([question.alone for question in asked])
    verdicts = []
    for rows in range(0, len(asked), 100):
        pictures = rearrange(made[rows : rows + 100], "b h w c -> b c h w")
        verdicts.append(world_judge.judged(judge, pictures, hole[rows : rows + 100]))
    thing = np.concatenate([verdict.thing for verdict in verdicts]) == things
    style = np.concatenate([verdict.style for verdict in verdicts]) == styles
    return {
        "holes": len(asked),
        "thing": float(thing.mean()),
        "style": float(style[~alone].mean()),
    }


def sheet(
    names: Sequence[tuple[str, str]], asked: Sequence[Question], made: torch.Tensor
) -> Image.Image:
    """Hole and result of each, the name below."""
    height = _SHOWN + _CAPTION
    rows = -(-len(asked) // _ACROSS)
    whole = Image.new("RGB", (_ACROSS * 2 * _SHOWN, rows * height), "white")
    pen = ImageDraw.Draw(whole)
    font = ImageFont.load_default(11)
    for number, question in enumerate(asked):
        row, column = divmod(number, _ACROSS)
        place = (column * 2 * _SHOWN, row * height)
        hidden = torch.where(question.hole[..., None] > 0.5, 1.0, question.photograph)
        whole.paste(_shown(hidden), place)
        whole.paste(_shown(made[number]), (place[0] + _SHOWN, place[1]))
        pen.text((place[0] + 3, place[1] + _SHOWN), names[question.thing][0], "black", font)
    return whole


def _shown(picture: torch.Tensor) -> Image.Image:
    levels = (picture * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(levels).resize((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)


CASES = {
    "box": ("box", "trained", Method()),
    "blob": ("blob", "trained", Method()),
    "box, Chinese": ("box", "trained", Method(language=1)),
    "box, strength 0": ("box", "trained", Method(strength=0)),
    "box, held-out pairs": ("box", "held out", Method()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of things, photographs")
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "models/cat_demo_model.safetensors"
    )
    parser.add_argument("--judge", type=Path, default=world_judge.default_path())
    parser.add_argument("--count", type=int, default=500, help="holes of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="the first 50 of each case")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the rates")
    arguments = parser.parse_args()
    launch.limit_threads(arguments.threads)
    scenery = world.load(arguments.world)
    judge = world_judge.load(arguments.judge, len(scenery.names))
    with torch.inference_mode():
        models = load_full_checkpoint(arguments.checkpoint)
    result = {}
    for case in arguments.cases:
        kind, targets, method = CASES[case]
        start = time.monotonic()
        asked = questions(scenery, arguments.count, kind, targets)
        made = answers(models, scenery.names, asked, method)
        result[case] = rates(judge, asked, made)
        words = ", ".join(f"{key} {value:.4g}" for key, value in result[case].items())
        print(f"{case}: {words} ({time.monotonic() - start:.0f} s)", flush=True)
        if arguments.sheet:
            path = arguments.sheet.with_stem(f"{arguments.sheet.stem}_{case.replace(', ', '_')}")
            sheet(scenery.names, asked[:50], made[:50]).save(path)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
