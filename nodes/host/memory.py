"""The host's memory: batches that can be cancelled, models that leave the GPU, the collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import symbols

Cancelled = symbols.Cancelled
BATCH = 16  # pictures that go through CLIP and SemInpainter at once


def chunks(total: int) -> Iterator[slice]:
    """Slices of at most BATCH rows, with progress on the node.

    Raises Cancelled where the user has pressed Cancel.
    """
    bar = symbols.progress_bar(total)
    for start in range(0, total, BATCH):
        raise_if_cancelled()
        yield slice(start, min(start + BATCH, total))
        bar.update(BATCH)


def raise_if_cancelled() -> None:
    """Raise Cancelled where the user has pressed Cancel."""
    symbols.raise_if_cancelled()


def compute_device() -> torch.device:
    """Where the host computes."""
    return symbols.compute_device()


def on_cpu() -> bool:
    """Whether the host computes on the CPU."""
    return compute_device().type == "cpu"


def card(device: torch.device) -> tuple[str | None, float]:
    """A CUDA GPU's name and its GB; None and 0 for any other device."""
    if device.type != "cuda":
        return None, 0.0
    return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(
        device
    ).total_memory / 1e9


def clear_memory() -> None:
    """Take all models off the GPU; the host loads them again when it needs them."""
    symbols.unload_all()


@contextmanager
def collector_paused():
    """Without Python's garbage collector.

    Building makes many objects that stay, and a full pass over all of the host's takes a fifth of
    a second.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
