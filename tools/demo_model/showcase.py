"""Photo, mask and result of one run through a real server; tools/demo.py's work."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from comfyui import ROOT, install, launch
from comfyui.local_server import LocalServer, PromptResult, ServerError, make_base

from . import scenes

DEMO_MODEL = "cat_demo_model.safetensors"
RANDOM_WEIGHTS = "random_weights_fp16.safetensors"
PICTURE = "cat_demo.png"  # photo and mask, in the server's input folder
SHOWN = 384  # pixels, side of each of the three pictures
NEEDED_SPACE = 4e9  # bytes, for random weights of full size
CPU_OPTIONS = ("--cpu", "--use-pytorch-cross-attention")  # the host's fastest attention there
NODE_WORK = {
    "CATLoadCheckpoint": "load checkpoint",
    "CATSemanticInpaint": "CLIP and SemInpainter",
    "CATInpaintConditioning": "VAE encode",
    "KSampler": "sample",
    "VAEDecode": "VAE decode",
}


@dataclass(frozen=True)
class Showcase:
    """What is drawn, and with what."""

    photo: Image.Image
    mask: Image.Image  # white = repaint
    label: str | None  # None = the workflow's own
    steps: int
    workflow: str  # name in workflows/api
    checkpoint: str  # name in models/cat_diffusion
    weights: str  # what they are, in words


def command(arguments, out: Path) -> int:
    """Draw what the arguments name; returns the exit code."""
    try:
        return demo(arguments, out)
    except (ServerError, install.SetupError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1


def demo(arguments, out: Path) -> int:
    """Run the workflow on a server, write the pictures to `out`, and say what took how long."""
    seconds = {}
    base = install.cache_dir() / "demo"
    make_base(base)
    start = time.monotonic()
    if arguments.full_size and not random_file().exists():
        random_weights()
        seconds["random checkpoint"] = time.monotonic() - start
        start = time.monotonic()
    if arguments.full_size:
        case = photograph(arguments.label, arguments.steps or 4)
    else:
        scene = scenes.scene(scenes.TEST[arguments.scene])
        case = drawn_scene(scene, arguments.hole, arguments.label, arguments.steps or 20)
    write_input(case, base / "input" / PICTURE)
    prompt = prompt_of(case, arguments.seed)

    with LocalServer(base, *(() if launch.has_gpu() else CPU_OPTIONS)) as server:
        seconds["start ComfyUI"] = time.monotonic() - start
        result = server.run(prompt, lambda kind, data: _print_progress(kind, data, prompt))
        if result.error:
            error = result.error
            print(f"Failed in {error['node_type']}: {error['exception_message']}")
            return 1
        made = Image.open(server.image_path(_saved_image(prompt, result)))
        side_by_side(case.photo, case.mask, made).save(out)

    seconds |= seconds_by_work(prompt, result)
    print()
    for work, spent in seconds.items():
        print(f"{work:<24} {spent:6.1f} s")
    print(f"Photo, mask and result: {out} ({case.weights}, {case.steps} steps)")
    return 0


def random_file() -> Path:
    """Where the random weights of full size lie, if they are there."""
    return install.cache_dir() / "demo/models/cat_diffusion" / RANDOM_WEIGHTS


def random_weights() -> Path:
    """The full-size random checkpoint of demo, benchmark and tests, made on first use.

    Raises SetupError where the disk is too full for it.
    """
    path = random_file()
    if path.exists():
        return path
    print(
        f"Writing random weights in the official layout, once, to {path} (3.5 GB) ...",
        flush=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < NEEDED_SPACE:
        raise install.SetupError(
            "Less than 4 GB are free there. Set CAT_DIFFUSION_CACHE to a folder on a larger disk."
        )
    # In a process of its own, which gives its memory back.
    subprocess.run(
        [sys.executable, ROOT / "tools/run.py", "demo_model.random_checkpoint", path],
        check=True,
    )
    return path


def photograph(label: str | None, steps: int) -> Showcase:
    """The photograph with random weights of full size."""
    print(
        "NOTE: the weights are random (nobody has published trained ones); "
        "the inpainted part will be noise.",
        flush=True,
    )
    return Showcase(
        photo=Image.open(ROOT / "web/photograph/photo.jpg"),
        mask=Image.open(ROOT / "web/photograph/mask.png"),
        label=label,
        steps=steps,
        workflow="cat_inpaint",
        checkpoint=RANDOM_WEIGHTS,
        weights="random weights",
    )


def drawn_scene(scene: scenes.Scene, hole: str, label: str | None, steps: int) -> Showcase:
    """A test scene with the demo model; without a label its own object."""
    label = label or scene.label
    print(
        "NOTE: a small demo model that knows coloured shapes only, not the paper's weights. "
        f"Drawing: {label}",
        flush=True,
    )
    return Showcase(
        photo=Image.fromarray(scene.without),
        mask=Image.fromarray(scenes.holes(scene, hole)),
        label=label,
        steps=steps,
        workflow="cat_demo",
        checkpoint=DEMO_MODEL,
        weights="demo model",
    )


def write_input(case: Showcase, path: Path) -> None:
    """Photo and mask as one picture: ComfyUI masks what is transparent."""
    picture = case.photo.convert("RGBA")
    picture.putalpha(case.mask.point(lambda value: 255 - value))
    picture.save(path)


def prompt_of(case: Showcase, seed: int) -> dict:
    """The example workflow, filled in."""
    prompt = json.loads((ROOT / f"workflows/api/{case.workflow}.json").read_text("utf-8"))
    for node in prompt.values():
        kind = node["class_type"]
        inputs = node["inputs"]
        if kind == "CATLoadCheckpoint":
            inputs["checkpoint"] = case.checkpoint
        elif kind in ("LoadImage", "CATDemoScene"):  # both give picture and mask
            node["class_type"] = "LoadImage"
            node["inputs"] = {"image": PICTURE}
        elif kind == "PrimitiveString" and case.label:
            inputs["value"] = case.label
        elif kind == "KSampler":
            inputs["steps"] = case.steps
            inputs["seed"] = seed
    return prompt


def side_by_side(photo: Image.Image, mask: Image.Image, made: Image.Image) -> Image.Image:
    """Photo, mask and result in one picture, as high as the result and at least SHOWN pixels."""
    scale = max(1, SHOWN // made.height)
    width = made.width * scale
    height = made.height * scale
    whole = Image.new("RGB", (3 * width, height))
    for place, part in enumerate((photo, mask, made)):
        shown = part.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(shown, (place * width, 0))
    return whole


def seconds_by_work(prompt: dict, result: PromptResult) -> dict[str, float]:
    """Seconds of a run by what its nodes do."""
    seconds = {}
    for node, spent in result.seconds.items():
        work = NODE_WORK.get(prompt[node]["class_type"], "other")
        seconds[work] = seconds.get(work, 0.0) + spent
    return seconds


def _saved_image(prompt: dict, result: PromptResult) -> dict:
    """What the server says of the picture that SaveImage wrote."""
    for number, node in prompt.items():
        if node["class_type"] == "SaveImage":
            return result.outputs[number]["images"][0]
    raise ServerError("the workflow saves no picture")


def _print_progress(kind: str, data: dict, prompt: dict) -> None:
    if kind == "executing" and data.get("node"):
        print(f"\n{prompt[data['node']]['class_type']} ...", end="", flush=True)
    elif kind == "progress":
        print(f" {data['value']}/{data['max']}", end="", flush=True)
