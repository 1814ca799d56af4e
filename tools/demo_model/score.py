"""Let the demo model fill held-out holes through the pack's nodes and the host's KSampler, and an independent judge look.

    python tools/evaluate_demo.py [--checkpoint models/cat_demo_model.safetensors] [--count 500] [--sheet sheet.png]

The judge (scene_classifier.py) is trained on first use, on scenes of its own, and kept in the cache.
"""

import argparse
import json
import math
import time
from pathlib import Path

from comfyui import ROOT, install

STEPS, CFG, SAMPLER, SCHEDULER = 20, 3.0, "ddim", "ddim_uniform"
_AT_ONCE = 16


def main() -> int:
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
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--strength", type=float, default=1.0, help="of the RefAdapter")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="write a contact sheet of the first 32 holes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the rates")
    arguments = parser.parse_args()
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    evaluate(arguments)
    return 0


def evaluate(arguments) -> dict:
    """Print and return the share of holes in which the judge sees the named object."""
    import numpy as np
    import torch

    from demo_model import classifier, scenes

    with torch.inference_mode():
        models = load(arguments.checkpoint)
    judge, rates, shown, start = the_judge(), {}, [], time.monotonic()
    for title, seeds in (
        ("test", scenes.TEST[: arguments.count]),
        ("held-out", scenes.HELD_OUT_TEST[: arguments.held_out]),
    ):
        drawn = [scenes.scene(seed) for seed in seeds]
        for kind in ("box", "exact") if drawn else ():
            made = inpaint(
                models,
                drawn,
                [s.label for s in drawn],
                kind,
                arguments.steps,
                arguments.cfg,
                arguments.strength,
                arguments.seed,
            )
            verdict = classifier.judge(judge, made, np.array([s.box for s in drawn]))
            shape = verdict.shape == [scenes.SHAPES.index(s.shape) for s in drawn]
            colour = verdict.colour == [scenes.COLOUR_NAMES.index(s.colour) for s in drawn]
            rates[f"{title} {kind}"] = {
                "holes": len(drawn),
                "right": float((shape & colour).mean()),
                "shape": float(shape.mean()),
                "colour": float(colour.mean()),
            }
            print(
                f"{title:>9} {kind:<6}{len(drawn):5} holes: {(shape & colour).mean():7.1%} right "
                f"(shape {shape.mean():.1%}, colour {colour.mean():.1%}), {time.monotonic() - start:.0f} s so far",
                flush=True,
            )
            shown += [(s, kind, picture) for s, picture in zip(drawn, made)][:16]
    if arguments.sheet:
        sheet(shown[:64]).save(arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(rates, indent=1) + "\n")
    return rates


def load(checkpoint: Path):
    """The outputs of CAT Load Checkpoint: model, clip, vae, clip_vision, cat_model."""
    from cat_diffusion.nodes.load import load_full_checkpoint

    return load_full_checkpoint(checkpoint)


def inpaint(models, scenes_, labels, kind: str, steps: int, cfg: float, strength: float, seed: int):
    """Fill the holes of scenes with the named objects; (B, S, S, 3) uint8, untouched outside the holes.

    The nodes get the scene without its target: KSampler starts from the photo's latent, in which the target would shine through.
    """
    import numpy as np
    import torch

    from demo_model import scenes

    made = [None] * len(scenes_)
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    for label, members in groups.items():
        for start in range(0, len(members), _AT_ONCE):
            some = members[start : start + _AT_ONCE]
            image = torch.from_numpy(np.stack([scenes_[i].without for i in some])).float() / 255
            mask = (
                torch.from_numpy(np.stack([scenes.holes(scenes_[i], kind) for i in some])).float()
                / 255
            )
            with torch.inference_mode():
                pictures = run_nodes(
                    models, image, mask, label, steps, cfg, strength, seed + 1000 * some[0]
                )
            for index, picture in zip(some, (pictures * 255).round().to(torch.uint8).numpy()):
                made[index] = picture
    return np.stack(made)


def run_nodes(models, image, mask, label: str, steps: int, cfg: float, strength: float, seed: int):
    """IMAGE (B, S, S, 3) and MASK (B, S, S) through the nodes of the demo workflow, one label for all."""
    from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
    from cat_diffusion.nodes.visual_prompt import predict

    model, clip, _, clip_vision, cat_model = models
    prompt = predict(cat_model, clip_vision, clip, image, mask, label)
    patched = apply_ref_adapter(model, cat_model, prompt, strength)
    return sample(models, patched, image, mask, label, steps, cfg, seed)


def sample(
    models,
    patched,
    image,
    mask,
    label: str,
    steps: int,
    cfg: float,
    seed: int,
    from_noise: bool = False,
):
    """The rest of the workflow with a patched model: conditioning, KSampler, VAE; the photo stays outside the hole.

    Args:
        from_noise: start from noise alone instead of adding it to the photo's own latent.
    """
    import torch

    import nodes
    from cat_diffusion.nodes.conditioning import inpaint_conditioning

    _, clip, vae, *_ = models
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (label, ""))
    positive, negative, latent = inpaint_conditioning(positive, negative, vae, image, mask)
    if from_noise:
        latent = latent | {"samples": torch.zeros_like(latent["samples"])}
    latent = nodes.KSampler().sample(
        patched, seed, steps, cfg, SAMPLER, SCHEDULER, positive, negative, latent
    )[0]
    made = nodes.VAEDecode().decode(vae, latent)[0].clamp(0, 1)
    return torch.where(mask[..., None] > 0.5, made, image)


def the_judge():
    """The independent classifier, trained on first use."""
    from demo_model import classifier

    path = install.cache_dir() / "demo/judge.safetensors"
    if not path.exists():
        print("Training the judge, once ...", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        model, _ = classifier.train(progress=True)
        classifier.save(path.with_suffix(".partial"), model)
        path.with_suffix(".partial").replace(path)
    return classifier.load(path)


def sheet(shown):
    """Photo, hole and result of each (scene, kind, picture), four to a row, the label below."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from demo_model import scenes

    size, caption = shown[0][2].shape[0], 14
    picture = Image.new(
        "RGB", (4 * 2 * size, math.ceil(len(shown) / 4) * (size + caption)), "black"
    )
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default_imagefont()
    for index, (s, kind, made) in enumerate(shown):
        x, y = index % 4 * 2 * size, index // 4 * (size + caption)
        hole = scenes.holes(s, kind)[..., None] > 127
        picture.paste(Image.fromarray(np.where(hole, np.uint8(255), s.image)), (x, y))
        picture.paste(Image.fromarray(made), (x + size, y))
        pen.text((x + 3, y + size + 1), f"{s.label}, {kind}", fill="white", font=font)
    return picture
