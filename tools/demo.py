"""Inpaint through a real ComfyUI with this pack, and write photo, mask and result side by side.

    python tools/demo.py [--label "red star"] [--scene 3] [--hole box|exact] [--out cat_demo.png]
    python tools/demo.py --full-size [--steps 4]

Needs only Python >= 3.10, git and pip. Where it finds no ComfyUI it installs one of 6 GB into a
cache, once. The first form uses the bundled demo model, which knows coloured shapes on drawn scenes
and nothing else. No trained CAT-Diffusion weights of full size are public, so the second writes
random ones: it shows that a photograph goes through, and what that costs.
"""

import argparse
import os
import time
from pathlib import Path

from comfyui import existing, install, launch


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    if not 0 <= arguments.scene < 100_000:
        parser.error(f"there is no scene {arguments.scene}: expected 0 to 99999")
    out = arguments.out.absolute()
    if not out.parent.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".webp"):
        parser.error(
            f"cannot write {out}: expected a name ending in .png, .jpg or .webp "
            "in a folder that exists"
        )
    if launch.COMFYUI not in os.environ:
        return run_in_comfyui(parser, arguments)
    with launch.importing():
        from demo_model import showcase

    return showcase.command(arguments, out)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    launch.add_host_options(parser, installs=False)
    parser.add_argument(
        "--label", help='what to draw, such as "red star" (default: what the scene has there)'
    )
    parser.add_argument(
        "--scene", type=int, default=10, help="number of the test scene, 0 to 99999"
    )
    parser.add_argument(
        "--hole",
        choices=("box", "exact"),
        default="box",
        help="the object's box or its exact outline",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--full-size",
        action="store_true",
        help="a photograph and random weights of full size (3.5 GB)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        help="sampling steps (default 20; 4 for random weights, which gain nothing by more)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("cat_demo.png"), help="where to write the picture"
    )
    return parser


def run_in_comfyui(parser: argparse.ArgumentParser, arguments) -> int:
    """Run this command again in a ComfyUI's Python, and say which; returns its exit code."""
    start = time.monotonic()
    try:
        host = existing.find_host(arguments.comfyui, arguments.python) or install.prepare_host()
    except install.SetupError as error:
        parser.error(str(error))
    print(f"ComfyUI: {host.path} ({time.monotonic() - start:.1f} s)", flush=True)
    return launch.run_again(host)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    launch.interruptible(main)
