"""How fast samples come, from pictures and from a cache, and what many shards take of memory."""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from cat_diffusion.cat_core.data import masks
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.manifest_records import ManifestRecords
from cat_diffusion.cat_core.training.batches import PreparedSamples, default_workers, loader
from cat_diffusion.cat_core.training.shard_file import BOTH, About, save_shard
from cat_diffusion.cat_core.training.shards import ShardedSamples
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.cat_core.training.stores import FreshSamples, SampleStore

from .rows import Row

AT_ONCE = 4  # samples that a worker hands over
REQUESTS = 17  # that are timed, the first of them not where workers start
WARM = 10  # memory is looked at first after one in ten shards


def rows(folder: Path, stages: Sequence[str], size: int = 512) -> Iterator[Row]:
    """Samples of pictures and of the caches FOLDER/STAGE, by number of workers."""
    records = ManifestRecords([folder / "manifest.jsonl"])
    for name in stages:
        stage = STAGES[name]
        fresh = FreshSamples(
            records, folder, None, objective=stage.objective, size=size, reads=stage.reads
        )
        stores = {
            f"preparing for {name}": fresh,
            f"reading the cache of {name}": ShardedSamples(folder / name, fresh, {}),
        }
        for form, store in stores.items():
            yield from _rates(form, store)


def _rates(form: str, store: SampleStore) -> Iterator[Row]:
    """In this process, and by worker processes."""
    samples = PreparedSamples(store, AT_ONCE, seed=0)
    requests = [(step, range(AT_ONCE)) for step in range(REQUESTS)]
    seconds = []
    for request in requests:
        start = time.perf_counter()
        samples[request]
        seconds.append((time.perf_counter() - start) / AT_ONCE)
    rate = 1 / statistics.median(seconds)
    yield Row(f"{form}, a sample on one core", "s", seconds, note=f"{rate:.1f} samples/s")
    workers = 1
    while workers <= default_workers() + 1:
        prepared = iter(loader(samples, requests, workers))
        next(prepared)  # workers have started
        start = time.perf_counter()
        count = AT_ONCE * sum(1 for _ in prepared)
        rate = count / (time.perf_counter() - start)
        yield Row(f"{form}, workers: {workers}", "samples/s", [rate])
        workers *= 2


def memory_of_shards(count: int) -> Iterator[Row]:
    """A process's memory while it reads tiny shards, far more than are open at a time."""
    record = Record("r", "r.png", caption="tiny")
    reads = STAGES["sem-inpainter"].reads
    sample = {key: torch.zeros(8, dtype=torch.float16) for key in reads}
    with tempfile.TemporaryDirectory() as name:
        fresh = FreshSamples([record] * count, Path(name), None, objective="distillation")
        store = ShardedSamples(Path(name), fresh, {})
        store.per_shard = 1
        for index in range(count):
            rows = {(variant, index): dict(sample) for variant in masks.VARIANTS}
            rows[BOTH, index] = {}
            path = Path(name, f"shard-{index:06d}.safetensors")
            save_shard(path, rows, About({}, {index: "r"}, reads))
        measured = {}
        for index in range(count):
            store.sample(index, masks.VARIANTS[0])
            if index + 1 in (count // WARM, count):
                measured[index + 1] = psutil.Process().memory_info().rss / 1e6
    for shards, megabytes in measured.items():
        yield Row(f"memory after {shards:,} of {count:,} shards", "MB", [megabytes])
