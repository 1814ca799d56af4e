"""Measure folders of finished pictures: FID, CLIP score, background, diversity, with intervals.

    python tools/evaluate.py results/cat \\
        --extractor inception:weights-inception-2015-12-05-6726825d.pth \\
        --clip-score ViT-L-14-quickgelu:openai --html report
    python tools/evaluate.py results/plain results/cat --json measured.json --csv measured.csv

A results folder, written by tools/generate.py, holds <id>.png for each record and run.json with
manifest, split, hole and size. Differences are to the first folder. Folders that were made alike
but for the seed also give diversity. What lacks its file or its library (requirements-evaluate.txt)
is left out, with a line that says why. Nothing is downloaded at any time.
"""

import argparse
import os
from pathlib import Path

from comfyui import launch
from evaluation import DEMO_MODEL


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    launch.enter_comfyui(parser, arguments, optional=("evaluate",))
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when open_clip's and ComfyUI's libraries are imported
    launch.limit_threads(arguments.threads)
    launch.start_host(arguments.cpu or not launch.has_cuda())
    from evaluation import comparison

    return comparison.command(arguments)


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="folders of finished pictures; differences are to the first",
    )
    parser.add_argument(
        "--manifest", type=Path, help="the records they were made of (default: run.json's)"
    )
    parser.add_argument(
        "--split", help="which of the manifest's records (default: run.json's, else all)"
    )
    parser.add_argument(
        "--hole",
        choices=("segment", "box", "official-box"),
        help="how holes were cut (default: run.json's)",
    )
    parser.add_argument(
        "--size", type=int, help="side of the pictures in pixels (default: run.json's)"
    )
    parser.add_argument(
        "--common", action="store_true", help="evaluate only the pictures that all folders have"
    )
    parser.add_argument(
        "--extractor",
        default=f"clip:{DEMO_MODEL}",
        metavar="KIND:FILE",
        help="network of FID, Local FID and similarity: inception:FILE with torch-fidelity's "
        "weights, or clip:FILE with a CLIP vision file or a CAT checkpoint "
        "(default: the demo model's, which knows drawn shapes only)",
    )
    parser.add_argument(
        "--clip-score",
        metavar="MODEL:PRETRAINED",
        help="open_clip model, and a weights file or a tag that was downloaded before; "
        "or local-dir:FOLDER",
    )
    parser.add_argument(
        "--cosines",
        type=Path,
        metavar="FILE",
        help="also compare observed and predicted features with the true ones, "
        "by this CAT checkpoint",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="bootstrap resamples of means; 0 = no intervals (default: 1000)",
    )
    parser.add_argument(
        "--fid-resamples",
        type=int,
        metavar="N",
        help="the same of FID (default: 100 up to 512 features, else 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the resamples and of the random pictures"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything, with the numbers of every picture",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FOLDER",
        help="write index.html: table, curves, best, worst and random pictures",
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    launch.add_host_options(parser)
    return parser


if __name__ == "__main__":
    launch.interruptible(main)
