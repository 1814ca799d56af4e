"""Run a manifest's samples through a method: a workflow on ComfyUI servers, or one in this process.

    python tools/generate.py workflows/baselines/cat.json \\
        --manifest data/test.jsonl --split test --hole box \\
        --out results/cat --server http://127.0.0.1:8188 http://127.0.0.1:8189

    python tools/generate.py --method diffusers:stable-diffusion-v1-5/stable-diffusion-inpainting \\
        --manifest data/test.jsonl --hole box --out results/sd --batch-size 8
    python tools/generate.py --method python:my_method.py:inpaint \\
        --manifest data/test.jsonl --hole box --out results/mine

The same command continues a run that was stopped or killed. Every sample gives ID.png and ID.json,
which says how it was made; run.json tells what the whole run has in common, and failed.jsonl names
every sample that could not be used and why. Needs Pillow and tqdm, and torch for a method in this
process; ComfyUI's Python has them. diffusers is in requirements-diffusers.txt.
Prepare data with tools/prepare_data.py.
"""

import argparse
from pathlib import Path

from comfyui import launch

COMFYUI = "comfyui"
LOCAL = ("prompt", "background", "batch_size", "dtype", "steps", "guidance", "decoder_steps", "cpu")


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    modules = {"PIL": "Pillow", "tqdm": "tqdm"}
    if arguments.method == COMFYUI:
        check_servers(parser, arguments)
        launch.enter_python(parser, arguments, modules)
        with launch.importing():
            from evaluation import generation
    else:
        check_local(parser, arguments)
        launch.enter_python(parser, arguments, {**modules, "torch": "torch"}, stays=True)
        with launch.importing():
            from evaluation import local_generation as generation

    return generation.command(arguments)


def check_servers(parser: argparse.ArgumentParser, arguments) -> None:
    """Exit where something is missing or of no use with workflows on servers."""
    if not (arguments.workflow and arguments.server):
        parser.error("give a workflow in API format and --server URL, or another --method")
    for name in LOCAL:
        if getattr(arguments, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            parser.error(
                f"{option} is for methods in this process; a workflow says such things itself, "
                "see --set"
            )


def check_local(parser: argparse.ArgumentParser, arguments) -> None:
    """Exit where something is of no use with a method in this process."""
    if arguments.workflow or arguments.server or arguments.changes:
        parser.error(
            f"--method {arguments.method} needs no workflow, --server or --set; leave them out"
        )
    if arguments.posterior != "mode":
        parser.error(f"--posterior is for workflows; {arguments.method} encodes as it does")
    if "{label}" not in arguments.prompt:
        parser.error(f"--prompt {arguments.prompt!r} has no {{label}} for the object's name")
    if arguments.method.startswith("python:"):
        for name in ("dtype", "steps", "guidance"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} is for diffusers pipelines; set it in your function")


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "workflow",
        type=Path,
        nargs="?",
        help="workflow in API format, with nodes titled Photo, Mask and Label",
    )
    parser.add_argument(
        "--method",
        type=_method,
        default=COMFYUI,
        help="comfyui: the workflow on --server; diffusers:FOLDER or diffusers:OWNER/NAME: an "
        "inpainting pipeline of the diffusers library; blended-latent:, with the same: Blended "
        "Latent Diffusion by its authors' recipe; python:FILE:FUNCTION: a function "
        "(image, mask, text, generator) that returns the finished picture",
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
        choices=("segment", "box", "official-box"),
        default="segment",
        help="the object's dilated mask or its box, as in training; or the annotation's box as "
        "the official inference draws it",
    )
    parser.add_argument(
        "--posterior",
        choices=("mode", "sample"),
        default="mode",
        help="the VAE's latent of the masked photo: its mode, as ComfyUI takes, or a sample, as "
        "the official code takes; for workflows with CAT Inpaint Conditioning",
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
        "--server", type=_url, nargs="+", default=[], metavar="URL", help="ComfyUI servers"
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
    add_local_options(parser)
    parser.add_argument(
        "--patience",
        type=float,
        default=600,
        metavar="SECONDS",
        help="stop when no server has answered for so long",
    )
    launch.add_host_options(parser, installs=False)
    return parser


def add_local_options(parser: argparse.ArgumentParser) -> None:
    """How methods in this process work."""
    parser.add_argument(
        "--prompt",
        default="{label}",
        metavar="TEMPLATE",
        help="text that the method gets, such as 'a photo of a {label}'",
    )
    parser.add_argument(
        "--background",
        choices=("photo", "made"),
        default="photo",
        help="outside the hole: the photo put back, as all workflows in baselines do, or what "
        "the method made",
    )
    parser.add_argument("--batch-size", type=_count, default=1, help="pictures at once")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of a diffusers pipeline (without: float16 on a GPU, else float32)",
    )
    parser.add_argument("--steps", type=_count, help="of a pipeline's sampler (without: its own)")
    parser.add_argument("--guidance", type=float, help="of a pipeline (without: its own)")
    parser.add_argument(
        "--decoder-steps",
        type=_count_or_none,
        default=75,
        help="of blended-latent's fit of the decoder to the background; 0 for none",
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU for a pipeline")


def _method(text: str) -> str:
    kind, _, rest = text.partition(":")
    file, _, function = rest.rpartition(":")
    is_complete = {
        COMFYUI: not rest,
        "diffusers": rest,
        "blended-latent": rest,
        "python": file and function,
    }
    if not is_complete.get(kind):
        raise argparse.ArgumentTypeError(
            f"{text} is no method; expected comfyui, diffusers:FOLDER_OR_NAME, "
            "blended-latent:FOLDER_OR_NAME or python:FILE:FUNCTION"
        )
    return text


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of them; expected 1 or more")
    return int(text)


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


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
