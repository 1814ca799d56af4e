"""The benchmark's sections one after the other; tools/bench.py's work."""

import dataclasses
import functools
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from cat_diffusion.nodes.host import memory
from cat_diffusion.nodes.host.symbols import no_progress_bars
from demo_model import showcase

from . import growth, loading_section, picture_sections, profiling, step_sections, training_steps
from .bench_models import Bench
from .contents import SECTIONS
from .machine import load, machine
from .rows import Row, page

# Those that measure the models of one process.
OF_MODELS = {
    "operations": step_sections.operations,
    "step": step_sections.step,
    "adapter": step_sections.adapter,
    "image": picture_sections.image,
    "sem-inpainter": picture_sections.sem_inpainter,
    "growth": growth.growth,
    "compile": profiling.compiled,
    "kernels": profiling.kernels,
    "profile": profiling.adapter_operators,
}
OF_PROCESSES = {"loading": loading_section.loading, "training": training_steps.training}


def command(arguments) -> int:
    """Run the sections that the arguments name, print them, and write them where asked."""
    arguments.checkpoint = arguments.checkpoint or showcase.random_weights()
    where = machine(arguments.cpu)
    for key, value in where.items():
        print(f"{key}: {value}", flush=True)
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
        written = page(arguments.page.read_text("utf-8"), where, results)
        arguments.page.write_text(written, "utf-8")
    if arguments.json:
        arguments.json.write_text(_as_json(where, arguments, results))
    return 0


def section(name: str, arguments) -> Iterator[Row]:
    """The rows of a section, one after the other as they are measured."""
    if name in OF_PROCESSES:
        release()
        yield from OF_PROCESSES[name](arguments)
        return
    with no_progress_bars(), torch.inference_mode():
        bench = _bench(arguments.checkpoint, arguments.size, arguments.rounds, arguments.cpu)
        yield from OF_MODELS[name](bench, arguments)


@functools.lru_cache(maxsize=1)
def _bench(checkpoint: Path, size: int, rounds: int, cpu: bool) -> Bench:
    """The models, kept from section to section."""
    return Bench(checkpoint, size, rounds, cpu)


def release() -> None:
    """Let go of the models: training wants their memory."""
    _bench.cache_clear()
    memory.clear_memory()
    gc.collect()


def _as_json(where: dict, arguments, results: dict[str, list[Row]]) -> str:
    """Every single value, and the command line."""
    settings = {}
    for key, value in vars(arguments).items():
        settings[key] = str(value) if isinstance(value, Path) else value
    sections = {}
    for name, rows in results.items():
        sections[name] = [dataclasses.asdict(row) for row in rows]
    return json.dumps({"machine": where, "settings": settings, "sections": sections}, indent=1)
