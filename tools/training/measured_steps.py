"""A few real steps of a run on this machine: how long they take, and what memory."""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_diffusion.cat_core.data.manifest_records import ManifestRecords
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.batches import Batches, default_workers, loader
from cat_diffusion.cat_core.training.encoding import stack
from cat_diffusion.cat_core.training.settings import Settings, TrainingRun
from cat_diffusion.cat_core.training.shards import ShardedSamples

from . import stage_parts
from .stage_run import StageRun

if sys.platform != "win32":
    import resource

WARM_UP = 1  # steps that are not counted
STEPS_ON_CPU = 2
STEPS_ON_GPU = 10
SAMPLES = 64  # that are encoded, or prepared, to see how fast that goes


@dataclass(frozen=True)
class MeasuredSteps:
    """What a few steps on this machine have shown."""

    device: str  # in words
    is_gpu: bool
    settings: Settings  # that they ran with
    fixed: float  # seconds of a step, whatever its batch
    part: float  # seconds of a part of a step, which goes through the model at once
    waiting: float  # share of a step
    prepared: float  # samples a second that the workers prepare, without anybody who trains
    workers: int
    records: int
    encoding: float  # seconds of a sample that goes into the cache; 0 without one
    cache_bytes: float  # of a sample; 0 without one
    encoding_flop: float  # of the frozen networks, a sample
    peak: float  # bytes
    memory: float  # bytes that there are


def measure(described: StageRun) -> MeasuredSteps:
    """Run a few steps as described; nothing stays on the disk.

    On a CPU they are of one sample in fp32, which is what it computes fastest.
    """
    is_gpu = torch.cuda.is_available() and not described.cpu
    settings = replace(described.settings, fsdp=False)
    if not is_gpu:
        settings = replace(settings, micro_batch_size=1, use_8bit_adam=False, precision="no")
    records = described.records(described.split)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        cache = Path(name, "cache") if described.cache else None
        return _measured(described, settings, records, cache, is_gpu)


def _measured(
    described: StageRun,
    settings: Settings,
    records: ManifestRecords,
    cache: Path | None,
    is_gpu: bool,
) -> MeasuredSteps:
    """`measure`, with a folder for the cache."""
    stage = described.stage
    file = stage_parts.load(described.base, stage.diffusion)
    modules, objective = stage_parts.build(
        stage,
        file,
        settings.seed,
        masked=described.masked,
        checkpointing=described.checkpointing,
        lora_rank=described.lora_rank,
        snr_gamma=settings.snr_gamma,
    )
    start = time.monotonic()
    encoders, store = stage_parts.encoded_samples(
        file,
        stage.objective,
        described.data,
        split=described.split,
        size=described.size,
        cache=cache,
        how=described.how,
        records=records,
        most=SAMPLES,
        cache_dtype=described.cache_dtype,
    )
    encoding = (time.monotonic() - start) / len(store) if cache else 0.0
    used = sum(path.stat().st_size for path in cache.glob("shard-*")) if cache else 0
    fresh = store.fresh if isinstance(store, ShardedSamples) else store
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        sample = next(filter(None, (fresh.sample(i, "box") for i in range(len(fresh)))), None)
        if sample is not None:
            fresh.batch([0], stack([sample]), torch.device("cpu"))
    workers = described.workers
    if workers is None:
        workers = default_workers()
    prepared = _prepared_a_second(
        stage_parts.batches_for(stage, encoders, store, settings, workers), settings
    )
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = {}
    waiting = []
    for parts in (1, 2):
        few = replace(
            settings,
            steps=WARM_UP + (STEPS_ON_GPU if is_gpu else STEPS_ON_CPU),
            batch_size=parts * settings.micro_batch_size,
            save_every=1,
            report_to="",
        )
        batches = stage_parts.batches_for(stage, encoders, store, few, workers)
        figures = _steps(TrainingRun(stage, modules, objective, few), batches, described.cpu)
        seconds[parts] = statistics.median(few.batch_size / rate for rate, _ in figures)
        waiting += [share for _, share in figures]
    part = max(seconds[2] - seconds[1], seconds[1] / 2)
    return MeasuredSteps(
        device=_device(is_gpu),
        is_gpu=is_gpu,
        settings=settings,
        fixed=max(seconds[1] - part, 0.0),
        part=part,
        waiting=statistics.median(waiting),
        prepared=prepared,
        workers=workers,
        records=len(records),
        encoding=encoding,
        cache_bytes=used / len(store),
        encoding_flop=float(counter.get_total_flops()),
        peak=torch.cuda.max_memory_reserved() if is_gpu else _peak_of_process(),
        memory=memory_there(is_gpu),
    )


def _steps(run: TrainingRun, batches: Batches, cpu: bool) -> list[tuple[float, float]]:
    """Samples a second and the share of waiting, of each step after the first."""
    figures = []

    def on_step(step, values):
        print(f"\rmeasuring: step {step} of {run.settings.steps} ", end="", flush=True)
        figures.append((values["images_per_second"], values["waiting"]))

    loop.train(run, batches, cpu=cpu, on_step=on_step)
    print("\r" + 40 * " " + "\r", end="", flush=True)
    return figures[WARM_UP:]


def _prepared_a_second(batches: Batches, settings: Settings) -> float:
    """Samples a second that the workers prepare."""
    micro = settings.micro_batch_size
    ahead = 2 * max(batches.workers, 1)  # parts that are ready before the first is asked for
    count = ahead + max(SAMPLES // micro, ahead)
    requests = [(0, range(i * micro, (i + 1) * micro)) for i in range(count)]
    prepared = iter(loader(batches.samples, requests, batches.workers))
    for _ in range(ahead):
        next(prepared)
    start = time.monotonic()
    rest = sum(1 for _ in prepared)
    return rest * micro / max(time.monotonic() - start, 1e-9)


def seconds_a_step(measured: MeasuredSteps, settings: Settings, cards: int = 1) -> float:
    """Seconds of a step of the run, data included, by what was measured."""
    share = settings.batch_size // cards
    computing = measured.fixed + share / measured.settings.micro_batch_size * measured.part
    return max(computing, share / measured.prepared)


def _device(is_gpu: bool) -> str:
    """What was measured on, in words."""
    if is_gpu:
        return torch.cuda.get_device_name()
    return f"a CPU, {torch.get_num_threads()} threads"


def memory_there(is_gpu: bool) -> float:
    """Bytes of the GPU, or of the machine."""
    if is_gpu:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total


def _peak_of_process() -> float:
    """The most bytes that this process has held, or where that is unknown those it holds."""
    if sys.platform != "win32":
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    memory = psutil.Process().memory_info()
    return float(getattr(memory, "peak_wset", memory.rss))
