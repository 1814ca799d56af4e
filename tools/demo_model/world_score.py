"""Let the demo model fill holes in held-out photographs through the pack's nodes; a judge looks.

python tools/run.py demo_model.world_score --world FOLDER [--count 500] [--sheet sheet.png]
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from cat_diffusion.cat_core.features import VisualPrompt
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.compare import compare
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import sampling as host_sampling
from cat_diffusion.nodes.load import Models, load_full_checkpoint
from cat_diffusion.nodes.visual_prompt import predict
from comfyui import ROOT, launch
from demo_model import world, world_judge
from demo_model.world_questions import Question, keep, questions

AT_ONCE = 25  # pictures
_ACROSS = 5  # results side by side on a sheet
_SHOWN = 128  # pixels, side of each picture of a sheet
_CAPTION = 14  # pixels


@dataclass(frozen=True)
class Method:
    """How holes are filled."""

    language: int = 0
    strength: float = 1.0
    steps: int = 20
    cfg: float = 3.0
    seed: int = 0


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
    """The shares of holes with the right thing, and with the style of what stands around.

    And how much more colours jump across the holes' edges than in the photographs.
    """
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
        "edge": edge_jump(asked, made),
    }


def edge_jump(asked: Sequence[Question], made: torch.Tensor) -> float:
    """The mean difference of neighbours across holes' edges, over that in the photographs."""
    hole = torch.stack([question.hole for question in asked])  # (B, S, S)
    photographs = torch.stack([question.photograph for question in asked])
    jumps = [0.0, 0.0]
    for axis in (1, 2):
        across = hole.diff(dim=axis).abs()[..., None]
        for number, pictures in enumerate((made, photographs)):
            jumps[number] += float((pictures.diff(dim=axis).abs() * across).sum())
    return jumps[0] / jumps[1]


def difference(asked: Sequence[Question], one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean difference of two sets of pictures in the holes, of 255."""
    inside = torch.stack([question.hole for question in asked])[..., None] > 0.5
    return 255 * float((one - other).abs()[inside.expand_as(one)].mean())


@torch.inference_mode()
def cosines(
    models: Models, names: Sequence[tuple[str, str]], asked: Sequence[Question]
) -> dict[str, float]:
    """How near CLIP's features of the hole, observed and predicted, come to the true ones."""
    compared = []
    for question in asked:
        compared.append(
            compare(
                models.cat_model,
                models.clip_vision,
                models.clip,
                question.whole[None],
                question.hole[None],
                names[question.thing][0],
            )
        )
    return {
        "holes": len(asked),
        "observed": float(np.mean([one.observed for one in compared])),
        "predicted": float(np.mean([one.predicted for one in compared])),
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


PLAIN = Method(strength=0)
CASES = {
    "box": ("box", "trained", Method()),
    "blob": ("blob", "trained", Method()),
    "box, Chinese": ("box", "trained", Method(language=1)),
    "box, strength 0": ("box", "trained", PLAIN),
    "box, another seed": ("box", "trained", Method(seed=1_000_000)),
    "box, held-out pairs": ("box", "held out", Method()),
}
BASE_CASE = "box, base U-Net"  # before CAT's own stages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of things, photographs")
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "models/cat_demo_model.safetensors"
    )
    parser.add_argument(
        "--base", type=Path, metavar="FILE", help="the model before CAT's stages: plain inpainting"
    )
    parser.add_argument("--judge", type=Path, default=world_judge.default_path())
    parser.add_argument("--count", type=int, default=500, help="holes of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=20, help="of sampling")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="the first 50 of each case")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the rates")
    parser.add_argument(
        "--keep", type=int, metavar="N", help="only write the first holes for the tests, to --out"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "tests/nodes/demo_questions")
    arguments = parser.parse_args()
    launch.limit_threads(arguments.threads)
    scenery = world.load(arguments.world)
    if arguments.keep:
        keep(questions(scenery, arguments.keep, "box"), scenery.names, arguments.out)
        return 0
    result = evaluate(arguments, scenery)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def evaluate(arguments: argparse.Namespace, scenery: world.World) -> dict[str, dict[str, float]]:
    """The rates of every case, which are printed as they come."""
    judge = world_judge.load(arguments.judge, len(scenery.names))
    with torch.inference_mode():
        models = load_full_checkpoint(arguments.checkpoint)
    cases = [(case, models, *CASES[case]) for case in arguments.cases]
    if arguments.base:
        with torch.inference_mode():
            base = load_full_checkpoint(arguments.base)
        cases.append((BASE_CASE, base, "box", "trained", PLAIN))
    result: dict[str, dict[str, float]] = {}
    pictures = {}
    for case, used, kind, targets, method in cases:
        start = time.monotonic()
        method = replace(method, steps=arguments.steps, cfg=arguments.cfg)
        asked = questions(scenery, arguments.count, kind, targets)
        made = answers(used, scenery.names, asked, method)
        result[case] = rates(judge, asked, made)
        _say(case, result[case], time.monotonic() - start)
        pictures[case] = made
        if arguments.sheet:
            path = arguments.sheet.with_stem(f"{arguments.sheet.stem}_{case.replace(', ', '_')}")
            sheet(scenery.names, asked[:50], made[:50]).save(path)
    asked = questions(scenery, arguments.count, "box")
    for case in ("box, strength 0", "box, another seed"):
        if {"box", case} <= pictures.keys():
            changed = difference(asked, pictures["box"], pictures[case])
            result[f"box against {case}"] = {"difference": changed}
            _say(f"box against {case}", {"difference": changed}, 0.0)
    start = time.monotonic()
    result["features"] = cosines(models, scenery.names, asked)
    _say("features", result["features"], time.monotonic() - start)
    return result


def _say(case: str, values: dict[str, float], seconds: float) -> None:
    words = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
    print(f"{case}: {words} ({seconds:.0f} s)", flush=True)
