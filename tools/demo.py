"""Inpaint through a real ComfyUI with this pack, and write photo, mask and result side by side.

    python tools/demo.py [--label "red star"] [--scene 3] [--hole box|exact] [--out cat_demo.png]
    python tools/demo.py --full-size [--steps 4]

Needs only Python >= 3.10, git and pip; installs ComfyUI into a cache on first use. The first form uses the bundled demo
model, which knows coloured shapes on drawn scenes and nothing else. No trained CAT-Diffusion weights of full size are
public, so the second writes random ones: it shows that a photograph goes through, and what that costs.
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

DEMO_MODEL = "cat_demo_model.safetensors"
RANDOM_WEIGHTS = "random_weights_fp16.safetensors"
SHOWN = 384  # pixels, side of each of the three pictures
NODE_WORK = {"CATLoadCheckpoint": "load checkpoint", "CATSemanticInpaint": "CLIP and SemInpainter",
             "CATInpaintConditioning": "VAE encode", "KSampler": "sample", "VAEDecode": "VAE decode"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    inside.add_host_options(parser)
    parser.add_argument("--label", help='what to draw, such as "red star" (default: what the scene has there)')
    parser.add_argument("--scene", type=int, default=10, help="number of the test scene, 0 to 99999")
    parser.add_argument("--hole", choices=("box", "exact"), default="box", help="the object's box or its exact outline")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--full-size", action="store_true", help="a photograph and random weights of full size (3.5 GB)")
    parser.add_argument("--steps", type=positive, help="sampling steps (default 20; 4 for random weights, which gain nothing by more)")
    parser.add_argument("--out", type=Path, default=Path("cat_demo.png"), help="where to write the picture")
    arguments = parser.parse_args()
    if not 0 <= arguments.scene < 100_000:
        parser.error(f"there is no scene {arguments.scene}: expected 0 to 99999")
    out = arguments.out.absolute()
    if not out.parent.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".webp"):
        parser.error(f"cannot write {out}: expected a name ending in .png, .jpg or .webp in a folder that exists")
    if inside.COMFYUI in os.environ:
        from comfy_server import ServerError
        try:
            return demo(arguments, out)
        except (ServerError, OSError) as error:
            print(f"\nerror: {error}", file=sys.stderr)
            return 1
    start = time.monotonic()
    try:
        host = hosts.chosen_host(arguments.comfyui, arguments.python)
    except hosts.SetupError as error:
        parser.error(str(error))
    print(f"ComfyUI: {host.path} ({time.monotonic() - start:.1f} s)", flush=True)
    return inside.rerun(host, __file__, sys.argv[1:])


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def demo(arguments, out: Path) -> int:
    """Runs in ComfyUI's Python: pictures, server, prompt, result."""
    import torch
    from PIL import Image
    from comfy_server import Server, make_base

    seconds, clock = {}, time.monotonic()
    base = hosts.cache_dir() / "demo"
    make_base(base)
    if arguments.full_size:
        checkpoint = base / "models/cat_diffusion" / RANDOM_WEIGHTS
        if not checkpoint.exists():
            print(f"Writing random weights in the official layout, once, to {checkpoint} (3.5 GB) ...", flush=True)
            if shutil.disk_usage(base).free < 4e9:
                print("Less than 4 GB are free there. Set CAT_DIFFUSION_CACHE to a folder on a larger disk.")
                return 1
            subprocess.run([sys.executable, inside.ROOT / "tools/random_checkpoint.py", checkpoint], check=True)
            seconds["random checkpoint"], clock = time.monotonic() - clock, time.monotonic()
        workflow, label, steps, about = "cat_inpaint", arguments.label, arguments.steps or 4, "random weights"
        photo, mask = (Image.open(inside.ROOT / "tools/demo" / name) for name in ("photo.jpg", "mask.png"))
        print("NOTE: the weights are random (nobody has published trained ones); the inpainted part will be noise.", flush=True)
    else:
        import scenes
        scene = scenes.scene(scenes.TEST[arguments.scene])
        workflow, label, steps, about = "cat_demo", arguments.label or scene.label, arguments.steps or 20, "demo model"
        photo, mask = Image.fromarray(scene.without), Image.fromarray(scenes.holes(scene, arguments.hole))
        print(f"NOTE: a small demo model that knows coloured shapes only, not the paper's weights. Drawing: {label}", flush=True)
    picture = photo.convert("RGBA")
    picture.putalpha(mask.point(lambda value: 255 - value))  # ComfyUI masks what is transparent
    picture.save(base / "input/cat_demo.png")

    prompt = json.loads((inside.ROOT / f"workflows/api/{workflow}.json").read_text())
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
    with Server(base, *([] if gpu else ["--cpu", "--use-pytorch-cross-attention"])) as server:
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
    from PIL import Image
    scale = max(1, SHOWN // made.height)
    width, height = made.width * scale, made.height * scale
    whole = Image.new("RGB", (3 * width, height))
    for place, part in enumerate((photo, mask, made)):
        whole.paste(part.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (place * width, 0))
    return whole


def _progress(kind: str, data: dict, prompt: dict) -> None:
    if kind == "executing" and data.get("node"):
        print(f"\n{prompt[data['node']]['class_type']} ...", end="", flush=True)
    elif kind == "progress":
        print(f" {data['value']}/{data['max']}", end="", flush=True)


if __name__ == "__main__":
    inside.interruptible(main)
