"""What a run will take: a few real steps on this machine, and the rest counted."""

import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_diffusion.cat_core.data.manifest_records import ManifestRecords
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.batches import Batches, default_workers, loader
from cat_diffusion.cat_core.training.encoding import stack
from cat_diffusion.cat_core.training.settings import Settings, TrainingError, TrainingRun
from cat_diffusion.cat_core.training.shards import ShardedSamples

from . import stage_parts, stage_run
from .counts import StageCounts, counted
from .presets import PRESETS, RESERVE, peak_of
from .stage_run import StageRun

if sys.platform != "win32":
    import resource

GB = 1e9
SHARE = 0.4  # of a card's peak that a step is taken to reach, where it is counted
MOST_WAITING = 0.02  # of a step, above which something is to be done about it
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


def command(arguments) -> int:
    """Plan the run that the arguments name, and print it; returns the exit code."""
    if loop.process_state(arguments.cpu).num_processes > 1:
        print(
            "error: plan measures one process and counts the others: start it without a launcher, "
            "with --preset 8x80gb for eight GPUs.",
            file=sys.stderr,
        )
        return 1
    try:
        described = stage_run.asked_for(arguments)
        print("\n".join(lines(described, arguments.preset, arguments.price_per_hour)))
    except KeyboardInterrupt:
        print("\nStopped; nothing was written.")
        return 130
    except CatError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def lines(described: StageRun, preset: str = "", price: float | None = None) -> Iterator[str]:
    """The plan of a run, line by line.

    Args:
        preset: one of presets.PRESETS, whose cards are counted; "" counts this machine as one.
        price: of an hour of the machine, in whatever money.
    """
    cards = PRESETS[preset].cards if preset else 1
    share = described.settings.batch_size / cards
    if share % described.settings.micro_batch_size:
        raise TrainingError(
            f"batch_size {described.settings.batch_size} is not a multiple of micro_batch_size "
            f"{described.settings.micro_batch_size} times {cards} processes. Change one of them."
        )
    counts = _counts(described)
    yield f"Plan of {described.stage.name}, {described.settings.steps} steps"
    yield f"{'':13}of {described.settings.batch_size} samples, {_choices(described)}"
    try:
        measured = measure(described)
    except torch.OutOfMemoryError:
        yield _row("memory", "this GPU's memory is full before the first step has ended")
        yield from memory_rows(described, counts, None, preset)
        return
    yield _row("measured on", measured.device)
    if not measured.is_gpu:
        yield _row("", f"with {_choices(replace(described, settings=measured.settings))},")
        yield _row("", "from which steps and hours are extrapolated; a GPU is another matter")
    seconds = seconds_a_step(measured, described.settings, cards)
    rate = described.settings.batch_size / seconds
    yield _row("steps/s", f"{_number(1 / seconds)}, {_number(rate)} samples/s{_times(cards)}")
    yield from waiting_rows(measured, rate / cards)
    yield from memory_rows(described, counts, measured, preset)
    if described.settings.fsdp:
        yield _row("", "without --fsdp: with it each of several GPUs needs less")
    yield from _disk(described, counts, measured)
    encoding = measured.records * measured.encoding / cards / 3600
    hours = described.settings.steps * seconds / 3600
    yield from _hours(described, hours, encoding, price)
    flop = counts.flop + (0 if described.cache else measured.encoding_flop)
    yield from _counted_hours(described, flop, preset, price, measured)
    yield _row("on top", "validation, sheets of samples and the writing of checkpoints")


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
        memory=_memory_there(is_gpu),
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


def _counts(described: StageRun) -> StageCounts:
    file = stage_parts.load(described.base, described.stage.diffusion)
    return counted(
        described.stage,
        file,
        described.settings.micro_batch_size,
        size=described.size,
        masked=described.masked,
        checkpointing=described.checkpointing,
        lora_rank=described.lora_rank,
    )


def waiting_rows(measured: MeasuredSteps, rate: float) -> Iterator[str]:
    """Rows on data: `rate` is of one process, in samples a second."""
    behind = max(1 - measured.prepared / rate, 0.0) if measured.prepared < rate else 0.0
    share = max(measured.waiting, behind)
    what = "data" if measured.cache_bytes else "data and frozen networks"
    yield _row(
        "waiting",
        f"{share:.1%} of a step for {what}; {measured.workers} workers prepare "
        f"{_number(measured.prepared)} samples/s",
    )
    if share > MOST_WAITING:
        if not measured.cache_bytes:
            yield _row("", "to change: --cache, which encodes each sample once")
        else:
            yield _row("", "to change: more --dataloader-num-workers, or a faster disk")


def memory_rows(
    described: StageRun, counts: StageCounts, measured: MeasuredSteps | None, preset: str
) -> Iterator[str]:
    """Rows on memory: measured, counted, and what to change."""
    if measured:
        kind = "GPU" if measured.is_gpu else "process"
        yield _row(
            "memory",
            f"{measured.peak / GB:.1f} GB of the {kind} at its peak, "
            f"{measured.memory / GB:.1f} GB are there",
        )
    need = _needed(described, counts)
    room = measured.memory / GB if measured and measured.is_gpu else None
    if preset:
        room = float(PRESETS[preset].gigabytes)
    elif room is None and torch.cuda.is_available() and not described.cpu:
        room = _memory_there(True) / GB
    text = f"{need:.1f} GB of a GPU, {RESERVE:.0f} GB for PyTorch included"
    yield _row("" if measured else "memory", f"by count: {text}")
    if room is None:
        fitting = [name for name, preset in PRESETS.items() if preset.gigabytes >= need]
        yield _row(
            "", f"which is a card of --preset {fitting[0]}" if fitting else "none holds that"
        )
    elif need > room or measured is None:
        yield _row("", f"more than {room:.1f} GB" if need > room else f"of {room:.1f} GB")
        for change in _smaller(described):
            yield _row("", f"to change: {change}")


def _needed(described: StageRun, counts: StageCounts) -> float:
    """GB of a GPU by count."""
    stays = not described.cache or bool(described.samples_every)
    return counts.memory(described.settings, stays) / GB + RESERVE


def _smaller(described: StageRun) -> Iterator[str]:
    """What would take less memory, as far as it is not chosen already."""
    settings = described.settings
    if settings.micro_batch_size > 1:
        yield f"--micro-batch-size {settings.micro_batch_size // 2}"
    if not described.checkpointing and described.stage.diffusion:
        yield "--checkpointing"
    if not described.cache:
        yield "--cache with --samples-every 0, which lets go of CLIP and VAE"
    elif described.samples_every:
        yield "--samples-every 0, which lets go of CLIP and VAE"
    if not settings.use_8bit_adam:
        yield "--use-8bit-adam"
    if settings.ema_decay:
        yield "no --use-ema"
    if settings.precision == "no":
        yield "--precision bf16"
    if "unet" in described.stage.parts:
        yield "ref-adapter-lora in the place of this stage, which leaves the U-Net as it is"


def _disk(described: StageRun, counts: StageCounts, measured: MeasuredSteps) -> Iterator[str]:
    """Rows on the disk."""
    settings = described.settings
    kept = settings.keep + 1 + settings.keep_best  # a new one is whole before an old one goes
    checkpoints = counts.checkpoint(settings) * kept / GB
    cache = measured.cache_bytes * measured.records / GB
    places = [(described.folder, checkpoints, f"{kept} checkpoints")]
    if described.cache:
        places.append((described.cache, cache, f"cache of {measured.records} records"))
    title = "disk"
    for folder, need, what in places:
        free = _free(folder) / GB
        yield _row(title, f"{_number(need)} GB for {what}, {_number(free)} GB are free")
        title = ""
        if need > free and "cache" in what:
            yield _row("", "to change: no --cache, another folder, or fewer records")
        elif need > free:
            yield _row("", "to change: --checkpoints-total-limit 1, or another folder")


def _hours(
    described: StageRun, hours: float, encoding: float, price: float | None
) -> Iterator[str]:
    """Rows on time and money, measured."""
    text = f"{_number(hours)} for {described.settings.steps} steps"
    if described.cache:
        text += f", {_number(encoding)} to fill the cache before"
    yield _row("hours", text)
    if price is not None:
        cost = (hours + encoding) * price
        yield _row("cost", f"{_number(cost)} at {_number(price)} an hour")


def _counted_hours(
    described: StageRun, flop: float, preset: str, price: float | None, measured: MeasuredSteps
) -> Iterator[str]:
    """Rows on arithmetic: what is computed, and how long cards take that were not tried."""
    settings = described.settings
    total = flop * settings.batch_size * settings.steps
    yield _row(
        "by count",
        f"{_number(flop / 1e12)} TFLOP a sample, {_number(total / 1e18)} EFLOP in all steps",
    )
    if measured.is_gpu:
        peak = peak_of(measured.device)
        reached = flop * measured.settings.micro_batch_size / measured.part / 1e12
        of_peak = f", {reached / peak:.0%} of the bf16 peak" if peak else ""
        yield _row("", f"a part reaches {reached:.1f} TFLOP/s{of_peak}")
        if not preset:
            return
    for name in [preset] if preset else PRESETS:
        card = PRESETS[name]
        hours = total / (SHARE * card.tflops * 1e12) / 3600
        many = f"{card.cards} x " if card.cards > 1 else ""
        cost = f", {_number(hours * price)} in money" if preset and price is not None else ""
        yield _row(
            "",
            f"{_number(hours)} hours on {many}{card.card} at {SHARE:.0%} of its bf16 peak{cost}: "
            "not measured",
        )


def _choices(described: StageRun) -> str:
    """What decides on memory and speed, in words."""
    settings = described.settings
    words = [f"{settings.micro_batch_size} at once", _precision(settings)]
    if described.checkpointing:
        words.append("checkpointing")
    if settings.use_8bit_adam:
        words.append("8-bit AdamW")
    words.append("cached" if described.cache else "encoded in each step")
    return ", ".join(words)


def _precision(settings: Settings) -> str:
    return "fp32" if settings.precision == "no" else settings.precision


def _device(is_gpu: bool) -> str:
    """What was measured on, in words."""
    if is_gpu:
        return torch.cuda.get_device_name()
    return f"a CPU, {torch.get_num_threads()} threads"


def _memory_there(is_gpu: bool) -> float:
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


def _free(folder: Path) -> float:
    """Bytes that are free where a folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _times(cards: int) -> str:
    return f", {cards} times one process, without their exchange" if cards > 1 else ""


def _row(title: str, text: str) -> str:
    return f"{title:12} {text}"


def _number(value: float) -> str:
    """A number in three digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
