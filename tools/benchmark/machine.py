"""What the numbers were measured on."""

import os
import platform
from pathlib import Path

import torch

from cat_diffusion.nodes.host import measuring

from .contents import STEADY_MEMORY


def machine(cpu: bool) -> dict[str, str]:
    """Device, processor, software and settings, in words."""
    steady = STEADY_MEMORY.items() <= os.environ.items()
    return {
        "device": "CPU only" if cpu else torch.cuda.get_device_name(),
        "processor": f"{_processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads used",
        "software": f"ComfyUI {measuring.version()}, PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "attention": measuring.attention_name(),
        "memory": "glibc keeps what is freed" if steady else "the system's allocator, unchanged",
        "load average at the start": load(),
    }


def load() -> str:
    """How busy the machine is, its own work included."""
    if not hasattr(os, "getloadavg"):
        return "unknown"
    return " ".join(f"{average:.2f}" for average in os.getloadavg())


def _processor() -> str:
    # Linux does not tell Python the name.
    linux = Path("/proc/cpuinfo")
    if linux.exists():
        for line in linux.read_text().splitlines():
            if "model name" in line:
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
