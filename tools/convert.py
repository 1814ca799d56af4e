"""Convert CAT-Diffusion checkpoints to safetensors, for this pack and for stock loaders.

    python tools/convert.py official.ckpt \\
        --base sd15_cat_inpainting.safetensors --cat-weights cat.safetensors
    python tools/convert.py sd15_inpainting.safetensors clip_vision.safetensors cat.safetensors \\
        --full cat_full.safetensors

It needs torch and safetensors, which ComfyUI's Python has. Outputs are written to a temporary
name and renamed; nothing is overwritten unless --overwrite is given. Beside each lies a model
card, OUT.md: parts, licence, and the stages of training that the headers tell of. The checkpoint
is mapped, not loaded, where the format allows.
"""

import argparse
from pathlib import Path

from comfyui import launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        help="official checkpoint (.ckpt or .safetensors), CAT weights, "
        "SD 1.5 inpainting checkpoint, CLIP vision file; "
        "of parts that several have, the last one's is taken",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="OUT",
        help="write U-Net, VAE and text encoder as an ordinary SD 1.5 inpainting checkpoint",
    )
    parser.add_argument(
        "--cat-weights",
        type=Path,
        metavar="OUT",
        help="write SemInpainter and/or RefAdapter as a CAT weights file",
    )
    parser.add_argument(
        "--clip-vision",
        type=Path,
        metavar="OUT",
        help="write the image encoder for ComfyUI's Load CLIP Vision",
    )
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="OUT",
        help="write the U-Net's LoRA, of the stage ref-adapter-lora, for ComfyUI's Load LoRA",
    )
    parser.add_argument(
        "--full", type=Path, metavar="OUT", help="write everything as one safetensors checkpoint"
    )
    parser.add_argument(
        "--use-ema",
        action="store_true",
        help="of checkpoints that tools/train.py --use-ema wrote, take ema.safetensors, the moving "
        "average, instead of weights.safetensors beside it",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="store as this type (default: as it is)"
    )
    parser.add_argument(
        "--licence", default="unknown", help="licence of the weights, for the header"
    )
    parser.add_argument(
        "--inert-objects",
        action="store_true",
        help="read a pickle with foreign Python objects by dropping them; nothing in it is run",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    launch.add_host_options(parser, installs=False)
    arguments = parser.parse_args()
    _check_outputs(parser, arguments)
    if arguments.use_ema:
        arguments.checkpoint = _averages(parser, arguments.checkpoint)
    launch.enter_python(parser, arguments, {"torch": "torch", "safetensors": "safetensors"})
    with launch.importing():
        from official import conversion

    return conversion.command(arguments)


def _averages(parser: argparse.ArgumentParser, paths: list[Path]) -> list[Path]:
    """The moving averages in the place of weights that have one; exits if there is none."""
    chosen = []
    for path in paths:
        average = path.with_name("ema.safetensors")
        is_checkpoint = path.name == "weights.safetensors" and average.is_file()
        chosen.append(average if is_checkpoint else path)
    if "ema.safetensors" not in {path.name for path in chosen}:
        parser.error(
            "--use-ema finds no ema.safetensors beside a weights.safetensors of these files; "
            "tools/train.py writes one where it is given --use-ema"
        )
    return chosen


def _check_outputs(parser: argparse.ArgumentParser, arguments) -> None:
    """Exit with a usage error unless there is something to write, under fitting names."""
    outputs = set()
    for name in ("base", "cat_weights", "clip_vision", "lora", "full"):
        path = getattr(arguments, name)
        if path is None:
            continue
        if path.suffix.lower() != ".safetensors":
            parser.error(f"{path} must end in .safetensors")
        if path.absolute() in outputs:
            parser.error("two outputs have the same name")
        outputs.add(path.absolute())
    if not outputs:
        parser.error(
            "nothing to write: give --base, --cat-weights, --clip-vision, --lora or --full"
        )


if __name__ == "__main__":
    launch.interruptible(main)
