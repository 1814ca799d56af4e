"""Photo, mask and result of one run through a real server; tools/demo.py's work."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from comfyui import ROOT, install
from comfyui.local_server import LocalServer, ServerError, make_base

from . import scenes

DEMO_MODEL = "cat_demo_model.safetensors"
RANDOM_WEIGHTS = "random_weights_fp16.safetensors"
SHOWN = 384  # pixels, side of each of the three pictures
NODE_WORK = {
    "CATLoadCheckpoint": "load checkpoint",
    "CATSemanticInpaint": "CLIP and SemInpainter",
    "CATInpaintConditioning": "VAE encode",
    "KSampler": "sample",
    "VAEDecode": "VAE decode",
}


def command(arguments, out: Path) -> int:
    """Draw what the arguments name; returns the exit code."""
    try:
        return demo(arguments, out)
    except (ServerError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1


def demo(arguments, out: Path) -> int:
    """Runs in ComfyUI's Python: pictures, server, prompt, result."""

    seconds, clock = {}, time.monotonic()
    base = install.cache_dir() / "demo"
    make_base(base)
    if arguments.full_size:
        checkpoint = base / "models/cat_diffusion" / RANDOM_WEIGHTS
        if not checkpoint.exists():
            print(
                f"Writing random weights in the official layout, once, to {checkpoint} (3.5 GB) ...",
                flush=True,
            )
            if shutil.disk_usage(base).free < 4e9:
                print(
                    "Less than 4 GB are free there. Set CAT_DIFFUSION_CACHE to a folder on a larger disk."
                )
                return 1
            subprocess.run(
                [sys.executable, ROOT / "tools/run.py", "demo_model.random_checkpoint", checkpoint],
                check=True,
            )
            seconds["random checkpoint"], clock = time.monotonic() - clock, time.monotonic()
        workflow, label, steps, about = (
            "cat_inpaint",
            arguments.label,
            arguments.steps or 4,
            "random weights",
        )
        photo, mask = (
            Image.open(ROOT / "tools/photograph" / name) for name in ("photo.jpg", "mask.png")
        )
        print(
            "NOTE: the weights are random (nobody has published trained ones); the inpainted part will be noise.",
            flush=True,
        )
    else:
        scene = scenes.scene(scenes.TEST[arguments.scene])
        workflow, label, steps, about = (
            "cat_demo",
            arguments.label or scene.label,
            arguments.steps or 20,
            "demo model",
        )
        photo, mask = (
            Image.fromarray(scene.without),
            Image.fromarray(scenes.holes(scene, arguments.hole)),
        )
        print(
            f"NOTE: a small demo model that knows coloured shapes only, not the paper's weights. Drawing: {label}",
            flush=True,
        )
    picture = photo.convert("RGBA")
    picture.putalpha(mask.point(lambda value: 255 - value))  # ComfyUI masks what is transparent
    picture.save(base / "input/cat_demo.png")

    prompt = json.loads((ROOT / f"workflows/api/{workflow}.json").read_text())
    for node in prompt.values():
        if node["class_type"] == "CATLoadCheckpoint":
            node["inputs"]["checkpoint"] = RANDOM_WEIGHTS if arguments.full_size else DEMO_MODEL
        elif node["class_type"] in ("LoadImage", "CATDemoScene"):  # both give picture and mask
            node |= {"class_type": "LoadImage", "inputs": {"image": "cat_demo.png"}}
        elif node["class_type"] == "PrimitiveString":
            node["inputs"]["value"] = label or node["inputs"]["value"]
        elif node["class_type"] == "KSampler":
            node["inputs"] |= {"steps": steps, "seed": arguments.seed}
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    with LocalServer(base, *([] if gpu else ["--cpu", "--use-pytorch-cross-attention"])) as server:
        seconds["start ComfyUI"] = time.monotonic() - clock
        run = server.run(prompt, lambda kind, data: _progress(kind, data, prompt))
        if run.error:
            print(f"Failed in {run.error['node_type']}: {run.error['exception_message']}")
            return 1
        saved = next(id for id, node in prompt.items() if node["class_type"] == "SaveImage")
        made = Image.open(server.image_path(run.outputs[saved]["images"][0]))
        side_by_side(photo, mask, made).save(out)
    print()
    seconds |= {NODE_WORK.get(prompt[node]["class_type"], "other"): 0.0 for node in run.seconds}
    for node, spent in run.seconds.items():
        seconds[NODE_WORK.get(prompt[node]["class_type"], "other")] += spent
    for work, spent in seconds.items():
        print(f"{work:<24} {spent:6.1f} s")
    print(f"Photo, mask and result: {out} ({about}, {steps} steps)")
    return 0


def side_by_side(photo, mask, made):
    """Photo, mask and result in one picture, as high as the result and at least SHOWN pixels."""
    scale = max(1, SHOWN // made.height)
    width, height = made.width * scale, made.height * scale
    whole = Image.new("RGB", (3 * width, height))
    for place, part in enumerate((photo, mask, made)):
        whole.paste(
            part.convert("RGB").resize((width, height), Image.Resampling.LANCZOS),
            (place * width, 0),
        )
    return whole


def _progress(kind: str, data: dict, prompt: dict) -> None:
    if kind == "executing" and data.get("node"):
        print(f"\n{prompt[data['node']]['class_type']} ...", end="", flush=True)
    elif kind == "progress":
        print(f" {data['value']}/{data['max']}", end="", flush=True)
