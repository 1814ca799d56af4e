"""Measure what CAT-Diffusion costs over plain inpainting, in the real ComfyUI, and print a table.

    python tools/bench.py [--sections step adapter ...] [--size 512] [--json measured.json]

Forms that are compared run in turn, in one process, and ratios are those of the same round. Weights are random and of full
size unless --checkpoint names a file; they are made into the cache on first use (3.5 GB).
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import host as hosts
import inside
from bench_rows import page

SECTIONS = {
    "operations": "multiplications of a step and of SemInpainter, counted",
    "step": "a step of the sampler: plain, RefAdapter as in the official code, RefAdapter as shipped",
    "adapter": "the RefAdapters of a step alone, and the memory bandwidth they need",
    "image": "a whole picture, from photo and mask to pixels",
    "sem-inpainter": "what happens once a picture: CLIP, SemInpainter, folding",
    "growth": "a step at other sizes, batches, adapters and prompts",
    "compile": "a step with torch.compile",
    "kernels": "GPU kernels of a step",
    "profile": "the RefAdapters of a step by operator, from the official form to the shipped one",
    "loading": "a full checkpoint, in fresh processes",
    "training": "a step of one picture in the first two training stages, fp32, recomputing activations, with and without a cache",
}

# glibc: keep what is freed. Else it goes back to the system or not by luck, and a step on a CPU took 8 % longer.
STEADY_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    listing = "; ".join(f"{name}: {text}" for name, text in SECTIONS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=f"which: {listing}")
    parser.add_argument("--checkpoint", type=Path, help="a full CAT-Diffusion checkpoint (.safetensors)")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="how often each form is timed")
    parser.add_argument("--steps", type=int, default=50, help="steps of the whole picture; with fewer, 50 are composed from the parts")
    parser.add_argument("--images", type=int, default=1, help="whole pictures of each form")
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 768, 1024, 1536], help="growth: sides in pixels")
    parser.add_argument("--growth-size", type=int, default=256, help="growth: side of the picture where something else grows")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16], help="growth: pictures at once")
    parser.add_argument("--stacks", type=int, nargs="*", default=[1, 2, 4], help="growth: adapters on one model")
    parser.add_argument("--training-steps", type=int, default=4, help="timed steps of each training run, after one that is not")
    parser.add_argument("--json", type=Path, help="also write every single value to this file")
    parser.add_argument("--page", type=Path, help="also write the tables into this Markdown file, between its marks")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    inside.add_host_options(parser)
    return parser


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    if inside.COMFYUI not in os.environ:
        os.environ.update(STEADY_MEMORY)
    inside.ensure_host(parser, arguments, __file__, "train")
    if arguments.checkpoint and not arguments.checkpoint.is_file():
        parser.error(f"{arguments.checkpoint} does not exist")
    if arguments.page:
        try:
            page(arguments.page.read_text("utf-8"), {}, {})  # now, not after hours
        except (OSError, ValueError) as error:
            parser.error(f"{arguments.page} cannot take the tables: {error}")
    arguments.checkpoint = arguments.checkpoint or random_weights()
    import torch
    arguments.cpu = arguments.cpu or not torch.cuda.is_available()
    inside.load_pack(arguments.cpu)
    where = machine(arguments.cpu)
    print("\n".join(f"{key}: {value}" for key, value in where.items()), flush=True)
    results = {}
    for name in arguments.sections:
        print(f"\n{name}: {SECTIONS[name]}", flush=True)
        results[name] = []
        for row in section(name, arguments):
            print(row, flush=True)
            results[name].append(row)
    where["load average at the end"] = load()
    print(f"\nload average at the end: {where['load average at the end']}")
    if arguments.page:
        arguments.page.write_text(page(arguments.page.read_text("utf-8"), where, results), "utf-8")
    if arguments.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        sections = {name: [dataclasses.asdict(row) for row in rows] for name, rows in results.items()}
        arguments.json.write_text(json.dumps({"machine": where, "settings": settings, "sections": sections}, indent=1))
    return 0


def section(name: str, arguments):
    """The rows of a section, one after the other as they are measured."""
    import bench_loading
    import bench_sampling
    import bench_training

    if name in ("loading", "training"):
        bench_sampling.release()
        return bench_loading.loading(arguments) if name == "loading" else bench_training.training(arguments)
    return bench_sampling.section(name, arguments)


def random_weights() -> Path:
    """The full-size random checkpoint of the demo and the tests, made if it is not there yet."""
    path = hosts.cache_dir() / "demo/models/cat_diffusion/random_weights_fp16.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, inside.ROOT / "tools/random_checkpoint.py", path], check=True)
    return path


def machine(cpu: bool) -> dict[str, str]:
    """What the numbers were measured on."""
    import comfy.ldm.modules.attention
    import torch
    from comfyui_version import __version__

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    device = "CPU only" if cpu else torch.cuda.get_device_name()
    return {"device": device, "processor": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
            "software": f"ComfyUI {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
            "attention": comfy.ldm.modules.attention.optimized_attention.__name__,
            "memory": "glibc keeps what is freed" if STEADY_MEMORY.items() <= os.environ.items() else "the system's allocator, unchanged",
            "load average at the start": load()}


def load() -> str:
    """How busy the machine is, its own work included."""
    return " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


if __name__ == "__main__":
    inside.interruptible(main)
