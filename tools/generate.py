"""Run a manifest's samples through ComfyUI servers that are running, by a workflow in API format.

    python tools/generate.py workflows/baselines/cat.json \\
        --manifest data/test.jsonl --split test --hole box \\
        --out results/cat --server http://127.0.0.1:8188 http://127.0.0.1:8189

The same command continues a run that was stopped or killed. Every sample gives ID.png and ID.json,
which says how it was made; run.json tells what the whole run has in common, and failed.jsonl names
every sample that could not be used and why. Needs Pillow and tqdm; ComfyUI's Python has both.
Prepare data with tools/prepare_data.py.
"""

import argparse
from pathlib import Path

from comfyui import launch


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    launch.enter_python(parser, arguments, {"PIL": "Pillow", "tqdm": "tqdm"})
    from evaluation import generation

    return generation.command(arguments)


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "workflow",
        type=Path,
        help="workflow in API format, with nodes titled Photo, Mask and Label",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        required=True,
        help="samples (JSON lines), see tools/prepare_data.py",
    )
    parser.add_argument("--split", default="test", help="which records of the manifest")
    parser.add_argument(
        "--hole",
        choices=("segment", "box"),
        default="segment",
        help="the object's dilated mask or its box, as in training",
    )
    parser.add_argument("--size", type=_side, default=512, help="side of the pictures, in pixels")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="every sample's own seed comes from this number and its id",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="RESULTS",
        help="folder for results; continued if it exists",
    )
    parser.add_argument(
        "--server", type=_url, nargs="+", required=True, metavar="URL", help="ComfyUI servers"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TITLE.INPUT=VALUE",
        dest="changes",
        help="change a value of the workflow, such as Checkpoint.ckpt_name=sd15.safetensors; "
        "may be given again",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600,
        metavar="SECONDS",
        help="stop when no server has answered for so long",
    )
    launch.add_host_options(parser, installs=False)
    return parser


def _side(text: str) -> int:
    if not text.isdigit() or int(text) < 64 or int(text) % 8:
        raise argparse.ArgumentTypeError(
            f"{text} is no side of a picture; expected a multiple of 8 from 64"
        )
    return int(text)


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"{text} is no server; expected something like http://127.0.0.1:8188"
        )
    return text.rstrip("/")


if __name__ == "__main__":
    launch.interruptible(main)
