"""Inpaint a real photograph through a real ComfyUI with this pack, and say where the picture is.

    python tools/demo.py [--comfyui PATH] [--python PYTHON] [--steps 4] [--out cat_demo.png]

Needs only Python >= 3.10, git and pip; installs ComfyUI into a cache on first use. No trained CAT-Diffusion weights
are public, so the weights are random and the inpainted part is noise: this shows that everything works.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import host as hosts
import inside

CHECKPOINT = "random_weights_fp16.safetensors"
NODE_WORK = {"CATLoadCheckpoint": "load checkpoint", "CATSemanticInpaint": "CLIP and SemInpainter",
             "CATInpaintConditioning": "VAE encode", "KSampler": "sample", "VAEDecode": "VAE decode"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", help="an existing ComfyUI folder; installed into the cache if not given")
    parser.add_argument("--python", help="the Python that runs that ComfyUI")
    parser.add_argument("--steps", type=positive, default=4, help="sampling steps (default 4: random weights gain nothing by more)")
    parser.add_argument("--out", type=Path, default=Path("cat_demo.png"), help="where to write the picture")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    if not out.parent.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".webp"):
        parser.error(f"cannot write {out}: expected a name ending in .png, .jpg or .webp in a folder that exists")
    if inside.COMFYUI in os.environ:
        from comfy_server import ServerError
        try:
            return demo(arguments.steps, out)
        except (ServerError, OSError) as error:
            print(f"\nerror: {error}", file=sys.stderr)
            return 1
    start = time.monotonic()
    try:
        host = (hosts.existing_host(arguments.comfyui, arguments.python) if arguments.comfyui else hosts.prepare_host())
    except hosts.SetupError as error:
        parser.error(str(error))
    print(f"ComfyUI: {host.path} ({time.monotonic() - start:.1f} s)", flush=True)
    return inside.rerun(host, __file__, sys.argv[1:])


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def demo(steps: int, out: Path) -> int:
    """Runs in ComfyUI's Python: checkpoint, server, prompt, picture."""
    import torch
    from PIL import Image
    from comfy_server import Server, make_base

    seconds, clock = {}, time.monotonic()
    base = hosts.cache_dir() / "demo"
    make_base(base)
    checkpoint = base / "models/cat_diffusion" / CHECKPOINT
    if not checkpoint.exists():
        print(f"Writing random weights in the official layout, once, to {checkpoint} (3.5 GB) ...", flush=True)
        if shutil.disk_usage(base).free < 4e9:
            print("Less than 4 GB are free there. Set CAT_DIFFUSION_CACHE to a folder on a larger disk.")
            return 1
        subprocess.run([sys.executable, inside.ROOT / "tools/random_checkpoint.py", checkpoint], check=True)
        seconds["random checkpoint"], clock = time.monotonic() - clock, time.monotonic()
    photo, mask = (Image.open(inside.ROOT / "tools/demo" / name) for name in ("photo.jpg", "mask.png"))
    picture = photo.convert("RGBA")
    picture.putalpha(mask.point(lambda value: 255 - value))  # ComfyUI masks what is transparent
    picture.save(base / "input/cat_demo.png")

    prompt = json.loads((inside.ROOT / "workflows/api/cat_inpaint.json").read_text())
    for node in prompt.values():
        if node["class_type"] == "CATLoadCheckpoint":
            node["inputs"]["checkpoint"] = checkpoint.name
        elif node["class_type"] == "LoadImage":
            node["inputs"]["image"] = "cat_demo.png"
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = steps
    print("NOTE: the weights are random (nobody has published trained ones); the inpainted part will be noise.", flush=True)
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    with Server(base, *([] if gpu else ["--cpu", "--use-pytorch-cross-attention"])) as server:
        seconds["start ComfyUI"] = time.monotonic() - clock
        run = server.run(prompt, lambda kind, data: _progress(kind, data, prompt))
        if run.error:
            print(f"Failed in {run.error['node_type']}: {run.error['exception_message']}")
            return 1
        made = server.image_path(next(o for o in run.outputs.values() if "images" in o)["images"][0])
    print()
    Image.open(made).save(out)
    seconds |= {NODE_WORK.get(prompt[node]["class_type"], "other"): 0.0 for node in run.seconds}
    for node, spent in run.seconds.items():
        seconds[NODE_WORK.get(prompt[node]["class_type"], "other")] += spent
    for work, spent in seconds.items():
        print(f"{work:<24} {spent:6.1f} s")
    print(f"Picture: {out} (random weights, {steps} steps)")
    return 0


def _progress(kind: str, data: dict, prompt: dict) -> None:
    if kind == "executing" and data.get("node"):
        print(f"\n{prompt[data['node']]['class_type']} ...", end="", flush=True)
    elif kind == "progress":
        print(f" {data['value']}/{data['max']}", end="", flush=True)


if __name__ == "__main__":
    inside.interruptible(main)
