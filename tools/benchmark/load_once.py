"""Loading a checkpoint once, in this process; tools/bench.py compares such processes.

    python tools/run.py benchmark.load_once pack FILE [--watch]
    python tools/run.py benchmark.load_once host BASE VISION [--watch]

The first does what CAT Load Checkpoint does, the second loads the same U-Net, text encoder, VAE and
CLIP vision by the host's own loaders. Prints what it took as JSON.
"""

import argparse
import gc
import json
import threading
import time
from pathlib import Path

import torch

from cat_diffusion.nodes import load
from cat_diffusion.nodes.host import measuring

KINDS = {"anonymous": "RssAnon", "of files": "RssFile", "all": "VmRSS"}  # as Linux names them
BETWEEN_LOOKS = 0.005  # seconds


class MemoryPeak:
    """`with MemoryPeak() as peak: ...; peak.megabytes`: the most that this process held meanwhile.

    Looking costs time, so timed runs do without.
    """

    def __init__(self):
        self.megabytes: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(BETWEEN_LOOKS):
            for kind, value in memory_held().items():
                self.megabytes[kind] = max(self.megabytes.get(kind, 0), value)


class Timed:
    """A function that remembers the seconds of its last call."""

    def __init__(self, function):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments):
        start = time.perf_counter()
        result = self.function(*arguments)
        self.seconds = time.perf_counter() - start
        return result


def main() -> int:
    """Load once and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loader", choices=("pack", "host"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--watch", action="store_true", help="the peak of the memory as well")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    arguments = parser.parse_args()
    size = 0
    for file in arguments.files:
        read(file)  # into the system's cache
        size += file.stat().st_size
    # Used and freed, as a virtual machine gets memory late.
    torch.ones(2 * size, dtype=torch.uint8)
    print(json.dumps(measure(arguments.loader, arguments.files, arguments.watch)))
    return 0


def measure(loader: str, files: list[Path], watch: bool) -> dict:
    """Seconds, and MB over what the process held before, at their peak and what stays."""
    # The node's own builder of SemInpainter and RefAdapter, which the host's loaders do without.
    load.build_cat_model = Timed(load.build_cat_model)
    before = memory_held()
    if watch:
        with MemoryPeak() as peak:
            loaded, seconds, cpu_seconds = _load(loader, files)
        at_peak = peak.megabytes
    else:
        loaded, seconds, cpu_seconds = _load(loader, files)
        at_peak = {}
    gc.collect()
    stays = memory_held()
    del loaded  # not earlier: it is what stays
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "cat_seconds": load.build_cat_model.seconds,
        "peak": _over(at_peak, before),
        "stays": _over(stays, before),
    }


def _load(loader: str, files: list[Path]) -> tuple:
    """What was loaded, seconds, seconds of the CPU."""
    start = time.perf_counter()
    cpu_start = time.process_time()
    with torch.inference_mode():
        if loader == "pack":
            loaded = load.load_full_checkpoint(files[0])
        else:
            loaded = measuring.load_with_stock_loaders(*map(str, files))
    return loaded, time.perf_counter() - start, time.process_time() - cpu_start


def read(file: Path) -> None:
    """Read a file and forget it."""
    with open(file, "rb") as content:
        while content.read(1 << 24):
            pass


def memory_held() -> dict[str, float]:
    """MB of this process by kind; empty where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
        lines = dict(line.split(":") for line in status.splitlines())
        return {kind: int(lines[name].split()[0]) * 1024 / 1e6 for kind, name in KINDS.items()}
    except (OSError, KeyError):
        return {}


def _over(megabytes: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {kind: value - before[kind] for kind, value in megabytes.items()}
