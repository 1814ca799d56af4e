"""The section of tools/bench.py on loading: time and memory, each in a process of its own, the file in the system's cache.

python tools/bench_loading.py pack FILE [--watch]   what CAT Load Checkpoint does, with its memory
python tools/bench_loading.py host BASE [VISION]    the host's own loaders, on the same U-Net, text encoder, VAE and CLIP vision
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmark.rows import Row, rows_in_turn
from comfyui import ROOT

PACK, HOST = "CAT Load Checkpoint, everything", "the host's loaders: U-Net, CLIP, VAE, CLIP vision"
SAME = "CAT Load Checkpoint, without SemInpainter and RefAdapter"
KINDS = {"anonymous": "RssAnon", "of files": "RssFile", "all": "VmRSS"}  # as Linux names them


def loading(arguments):
    """Rows: seconds in turn; then memory at its peak and what stays, over what the process held before."""
    with tempfile.TemporaryDirectory(dir=arguments.checkpoint.parent) as folder:
        base, vision = Path(folder, "base.safetensors"), Path(folder, "vision.safetensors")
        subprocess.run(
            [
                sys.executable,
                ROOT / "tools/convert.py",
                arguments.checkpoint,
                "--base",
                base,
                "--clip-vision",
                vision,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        forms = {HOST: ["host", base, vision], PACK: ["pack", arguments.checkpoint]}
        if os.path.getsize(base) < 1e9:  # the host's own loaders recognise full-size models only
            del forms[HOST]
        for file in (base, vision, arguments.checkpoint):
            _cache_anew(file)
        rounds = max(arguments.rounds // 2, 1)
        measured, watched = {name: [] for name in forms}, {name: [] for name in forms}
        for i in range(rounds + min(rounds, 3)):
            for name in list(forms)[
                :: 1 if i % 2 == 0 else -1
            ]:  # apart: watching the memory costs time
                (measured if i < rounds else watched)[name].append(
                    _in_a_process(forms[name], arguments.cpu, i >= rounds)
                )
    for unit, key in (("s", "seconds"), ("s of CPU", "cpu_seconds")):
        seconds = {name: [run[key] for run in runs] for name, runs in measured.items()}
        if key == "seconds":
            seconds[SAME] = [run[key] - run["cat_seconds"] for run in measured[PACK]]
        for row in rows_in_turn(seconds, HOST if HOST in forms else None):
            row.unit = unit
            yield row
    for name, runs in watched.items():
        if runs[0]["peak"]:
            for kind in KINDS:
                peak, stays = ([run[when][kind] for run in runs] for when in ("peak", "stays"))
                ratios = [a / b for a, b in zip(peak, stays)] if kind == "all" else []
                yield Row(
                    f"memory {kind}, peak over what stays: {name}",
                    "MB",
                    peak,
                    ratios,
                    f"stays {max(stays):.0f} MB",
                )


def _cache_anew(file: Path) -> None:
    """Read a file into the system's cache, where Linux allows as if for the first time: how a file came into the cache, written
    or read, decides how large its pages there are, and these how long loading takes."""
    with open(file, "rb") as content:
        if hasattr(os, "posix_fadvise"):
            os.fsync(content)  # what is not on the disk yet stays in the cache
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while content.read(1 << 24):
            pass


def _in_a_process(command: list, cpu: bool, watch: bool) -> dict:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }  # as users have it
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/run.py",
            "benchmark.loading",
            *map(str, command),
            *["--cpu"] * cpu,
            *["--watch"] * watch,
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def _memory() -> dict[str, float]:
    """MB of this process by kind; empty where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return {kind: int(lines[name].split()[0]) * 1024 / 1e6 for kind, name in KINDS.items()}
    except (OSError, KeyError):
        return {}


def main() -> None:
    """Load once and print what it took as JSON; --watch: with the memory's peak."""
    cpu, watched = "--cpu" in sys.argv, "--watch" in sys.argv
    which, *files = [word for word in sys.argv[1:] if not word.startswith("--")]
    import comfy.clip_vision
    import comfy.sd
    import torch

    from cat_diffusion.nodes.host.build import build_cat_model
    from cat_diffusion.nodes.load import load_full_checkpoint

    for file in files:  # into the system's cache
        with open(file, "rb") as content:
            while content.read(1 << 24):
                pass
    torch.ones(
        2 * sum(map(os.path.getsize, files)), dtype=torch.uint8
    )  # used and freed, as a virtual machine gets memory late
    peak, over, cat_seconds = {}, threading.Event(), 0.0

    def build_cat_model(file, build=build_cat_model):
        nonlocal cat_seconds
        start = time.perf_counter()
        built = build(file)
        cat_seconds = time.perf_counter() - start
        return built

    build_cat_model = build_cat_model

    def watch():
        while not over.wait(0.005):
            for kind, value in _memory().items():
                peak[kind] = max(peak.get(kind, 0), value)

    before = _memory()
    watcher = threading.Thread(target=watch)
    if watched:
        watcher.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        if which == "pack":
            kept = load_full_checkpoint(files[0])
        else:
            kept = [
                comfy.sd.load_checkpoint_guess_config(files[0]),
                comfy.clip_vision.load(files[1]),
            ]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    over.set()
    if watched:
        watcher.join()
    gc.collect()
    stays = _memory()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "cat_seconds": cat_seconds,
                **{
                    name: {kind: value - before[kind] for kind, value in figures.items()}
                    for name, figures in (("peak", peak), ("stays", stays))
                },
            }
        )
    )
    del kept
