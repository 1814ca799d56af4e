"""The benchmark's sections one after the other, and what machine they ran on; tools/bench.py's work."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import comfy.ldm.modules.attention
import torch
from comfyui_version import __version__

from comfyui import ROOT, install

from . import loading, sampling, training_steps
from .contents import SECTIONS, STEADY_MEMORY
from .rows import page


def command(arguments) -> int:
    """Run the sections that the arguments name, print them, and write them where asked."""
    arguments.checkpoint = arguments.checkpoint or random_weights()
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
        settings = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(arguments).items()
        }
        sections = {
            name: [dataclasses.asdict(row) for row in rows] for name, rows in results.items()
        }
        arguments.json.write_text(
            json.dumps({"machine": where, "settings": settings, "sections": sections}, indent=1)
        )
    return 0


def section(name: str, arguments):
    """The rows of a section, one after the other as they are measured."""

    if name in ("loading", "training"):
        sampling.release()
        return (
            loading.loading(arguments) if name == "loading" else training_steps.training(arguments)
        )
    return sampling.section(name, arguments)


def random_weights() -> Path:
    """The full-size random checkpoint of the demo and the tests, made if it is not there yet."""
    path = install.cache_dir() / "demo/models/cat_diffusion/random_weights_fp16.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, ROOT / "tools/run.py", "demo_model.random_checkpoint", path],
            check=True,
        )
    return path


def machine(cpu: bool) -> dict[str, str]:
    """What the numbers were measured on."""

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        name = names[0] if names else name
    device = "CPU only" if cpu else torch.cuda.get_device_name()
    return {
        "device": device,
        "processor": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "software": f"ComfyUI {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
        "attention": comfy.ldm.modules.attention.optimized_attention.__name__,
        "memory": "glibc keeps what is freed"
        if STEADY_MEMORY.items() <= os.environ.items()
        else "the system's allocator, unchanged",
        "load average at the start": load(),
    }


def load() -> str:
    """How busy the machine is, its own work included."""
    return " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
