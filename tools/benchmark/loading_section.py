"""The section on loading: time and memory, each in a process of its own.

The file is in the system's cache.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from comfyui import ROOT

from .load_once import KINDS, read
from .rows import Row, rows_in_turn

PACK = "CAT Load Checkpoint, everything"
HOST = "the host's loaders: U-Net, CLIP, VAE, CLIP vision"
SAME = "CAT Load Checkpoint, without SemInpainter and RefAdapter"
FULL_SIZE = 1e9  # bytes: the host's own loaders recognise models of that size only
MOST_WATCHED = 3  # rounds


def loading(arguments) -> Iterator[Row]:
    """Seconds in turn; then memory at its peak and what stays, over what was held before."""
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.parent) as folder:
        base = Path(folder, "base.safetensors")
        vision = Path(folder, "vision.safetensors")
        _split(arguments.checkpoint, base, vision)
        forms = {HOST: ["host", base, vision], PACK: ["pack", arguments.checkpoint]}
        if base.stat().st_size < FULL_SIZE:
            del forms[HOST]
        for file in (base, vision, arguments.checkpoint):
            _cache_anew(file)
        rounds = max(arguments.rounds // 2, 1)
        # Apart: watching the memory costs time.
        timed = _runs_in_turn(forms, rounds, arguments.cpu)
        watched = _runs_in_turn(forms, min(rounds, MOST_WATCHED), arguments.cpu, watch=True)
    yield from _time_rows(timed)
    for name, runs in watched.items():
        yield from _memory_rows(name, runs)


def _split(checkpoint: Path, base: Path, vision: Path) -> None:
    """Write what the host's own loaders read."""
    command = [sys.executable, ROOT / "tools/convert.py", checkpoint]
    command += ["--base", base, "--clip-vision", vision]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _cache_anew(file: Path) -> None:
    """Read a file into the system's cache, where Linux allows as if for the first time.

    How a file came into the cache, written or read, decides how large its pages there are, and
    these how long loading takes.
    """
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as content:
            os.fsync(content)  # what is not on the disk yet stays in the cache
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read(file)


def _runs_in_turn(
    forms: dict[str, list], rounds: int, cpu: bool, watch: bool = False
) -> dict[str, list[dict]]:
    """What each form measures in each round, in an order that turns."""
    names = list(forms)
    runs = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(_in_a_process(forms[name], cpu, watch))
        names.reverse()
    return runs


def _in_a_process(words: list, cpu: bool, watch: bool) -> dict:
    command = [sys.executable, ROOT / "tools/run.py", "benchmark.load_once", *words]
    if cpu:
        command.append("--cpu")
    if watch:
        command.append("--watch")
    environment = {}  # as users have it, without STEADY_MEMORY
    for name, value in os.environ.items():
        if not name.startswith("MALLOC_"):
            environment[name] = value
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def _time_rows(timed: dict[str, list[dict]]) -> Iterator[Row]:
    reference = HOST if HOST in timed else None
    for unit, key in (("s", "seconds"), ("s of CPU", "cpu_seconds")):
        seconds = {}
        for name, runs in timed.items():
            seconds[name] = [run[key] for run in runs]
        if key == "seconds":
            seconds[SAME] = [run["seconds"] - run["cat_seconds"] for run in timed[PACK]]
        for row in rows_in_turn(seconds, reference):
            row.unit = unit
            yield row


def _memory_rows(name: str, runs: list[dict]) -> Iterator[Row]:
    """None where the system does not say how much memory a process holds."""
    if not runs[0]["peak"]:
        return
    for kind in KINDS:
        peak = [run["peak"][kind] for run in runs]
        stays = [run["stays"][kind] for run in runs]
        ratios = []
        if kind == "all":
            for most, rest in zip(peak, stays, strict=True):
                ratios.append(most / rest)
        what = f"memory {kind}, peak over what stays: {name}"
        yield Row(what, "MB", peak, ratios, f"stays {max(stays):.0f} MB")
