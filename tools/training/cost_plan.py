"""What a run will take: a few real steps on this machine, and the rest counted."""

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.training import fsdp, loop
from cat_diffusion.cat_core.training.settings import Settings, TrainingError

from . import stage_parts, stage_run
from .counts import StageCounts, counted
from .measured_steps import MeasuredSteps, measure, memory_there, seconds_a_step
from .presets import PRESETS, RESERVE, peak_of
from .stage_run import StageRun

GB = 1e9
SHARE = 0.4  # of a card's peak that a step is taken to reach, where it is counted
MOST_WAITING = 0.02  # of a step, above which something is to be done about it


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
    fsdp.refuse(described.settings, max(cards, 2))  # of several, which a plan counts
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
        room = memory_there(True) / GB
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
    if not settings.use_8bit_adam and not settings.fsdp:
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
