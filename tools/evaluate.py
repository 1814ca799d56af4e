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
    check_study(parser, arguments)
    launch.enter_comfyui(parser, arguments, optional=("evaluate",))
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when open_clip's and ComfyUI's libraries are imported
    launch.limit_threads(arguments.threads)
    with launch.importing():
        launch.start_host(arguments.cpu or not launch.has_cuda())
        if arguments.study or arguments.ratings:
            from evaluation import user_study as body
        else:
            from evaluation import comparison as body

    return body.command(arguments)


def check_study(parser: argparse.ArgumentParser, arguments) -> None:
    """Exit where folders, a study and ratings do not go together."""
    if arguments.ratings and (arguments.study or arguments.results):
        parser.error("--ratings needs neither folders nor --study; give it alone, with --key")
    if not (arguments.ratings or arguments.results):
        parser.error("give folders of finished pictures, or --ratings")


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results",
        type=Path,
        nargs="*",
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
    add_metric_options(parser)
    add_study_options(parser)
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
        "--markdown",
        type=Path,
        metavar="FILE",
        help="write tables with the folders as columns, by size of hole and by name too",
    )
    parser.add_argument("--latex", type=Path, metavar="FILE", help="the same tables for LaTeX")
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


def add_metric_options(parser: argparse.ArgumentParser) -> None:
    """Networks of metrics that are left out without them."""
    parser.add_argument(
        "--cmmd",
        metavar="MODEL:PRETRAINED",
        help="open_clip model of CMMD, as for --clip-score; its paper has ViT-L-14-336:openai",
    )
    parser.add_argument(
        "--dinov2",
        type=Path,
        metavar="FOLDER",
        help="DINOv2 for transformers, for the Fréchet distance by its features; its paper has "
        "facebook/dinov2-large",
    )
    parser.add_argument(
        "--lpips",
        type=Path,
        metavar="FILE",
        help="torchvision's alexnet-owt-7be5be79.pth, for LPIPS outside the hole",
    )
    parser.add_argument(
        "--score",
        metavar="python:FILE:FUNCTION",
        help="a function (image, mask, text) of yours that returns a number, such as ImageReward's",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep features there by extractor and picture: the same command goes on where it was "
        "stopped",
    )


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """The paper's user study."""
    parser.add_argument(
        "--study",
        type=Path,
        metavar="PAGE",
        help="write a page (.html) on which people rate pictures of 2 to 6 folders blind, and its "
        "key beside it, instead of measuring",
    )
    parser.add_argument(
        "--pictures", type=int, default=30, metavar="N", help="in the study (default: 30)"
    )
    parser.add_argument(
        "--ratings",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="ratings that the page saved: means, intervals over raters and pictures, agreement",
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="of the study, for --ratings")


if __name__ == "__main__":
    launch.interruptible(main)
