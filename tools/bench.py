"""Measure what CAT-Diffusion costs over plain inpainting, in the real ComfyUI, and print a table.

    python tools/bench.py [--sections step adapter ...] [--size 512] [--json measured.json]

Forms that are compared run in turn, in one process, and ratios are those of the same round. Weights
are random and of full size unless --checkpoint names a file; they are made into the cache on first
use (3.5 GB).
"""

import argparse
import os
from pathlib import Path

from benchmark.contents import SECTIONS, STEADY_MEMORY
from benchmark.rows import page
from comfyui import launch


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    listing = "; ".join(f"{name}: {text}" for name, text in SECTIONS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="NAME",
        help=f"which: {listing}",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="a full CAT-Diffusion checkpoint (.safetensors)"
    )
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="how often each form is timed")
    parser.add_argument(
        "--steps",
        type=int,
        default=50,
        help="steps of the whole picture; with fewer, 50 are composed from the parts",
    )
    parser.add_argument("--images", type=int, default=1, help="whole pictures of each form")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="*",
        default=[512, 768, 1024, 1536],
        help="growth: sides in pixels",
    )
    parser.add_argument(
        "--growth-size",
        type=int,
        default=256,
        help="growth: side of the picture where something else grows",
    )
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 4, 16], help="growth: pictures at once"
    )
    parser.add_argument(
        "--stacks", type=int, nargs="*", default=[1, 2, 4], help="growth: adapters on one model"
    )
    parser.add_argument(
        "--training-steps",
        type=int,
        default=4,
        help="timed steps of each training run, after one that is not",
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=5000,
        help="training: tiny shards that are read while memory is looked at",
    )
    parser.add_argument("--json", type=Path, help="also write every single value to this file")
    parser.add_argument(
        "--page", type=Path, help="also write the tables into this Markdown file, between its marks"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    launch.add_host_options(parser)
    return parser


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    if launch.COMFYUI not in os.environ:
        os.environ.update(STEADY_MEMORY)
    launch.enter_comfyui(parser, arguments, "train")
    if arguments.checkpoint and not arguments.checkpoint.is_file():
        parser.error(f"{arguments.checkpoint} does not exist")
    if arguments.page:
        try:
            page(arguments.page.read_text("utf-8"), {}, {})  # now, not after hours
        except (OSError, ValueError) as error:
            parser.error(f"{arguments.page} cannot take the tables: {error}")
    arguments.cpu = arguments.cpu or not launch.has_cuda()
    with launch.importing():
        launch.start_host(arguments.cpu)
        from benchmark import sections

    return sections.command(arguments)


if __name__ == "__main__":
    launch.interruptible(main)
