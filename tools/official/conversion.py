"""Official checkpoints in, safetensors out: for this pack and for stock loaders."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.weights import trained_stages
from cat_diffusion.cat_core.weights.trained_stages import TrainedStage

from . import model_card


def command(arguments) -> int:
    """Convert as the arguments say; returns the exit code."""
    try:
        convert(arguments)
    except weights.WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert(arguments) -> None:
    """Read, check, split, write."""
    if not arguments.overwrite:
        _check_free(arguments)
    files = []
    for path in arguments.checkpoint:
        with _announced(f"Reading and checking {path}"):
            files.append(weights.read(path, inert_objects=arguments.inert_objects))
    file = weights.merge(files)
    print(f"Found {weights.describe(file.parts)}.")
    stages = []
    for part_file in files:
        stages += trained_stages.of_header(part_file.metadata)
    origins = "; ".join(_origin(part_file) for part_file in files)
    _write_for_stock_loaders(file, arguments, origins, stages)
    _write_for_the_pack(file, arguments, origins, stages)


def _check_free(arguments) -> None:
    """Raise before anything is read if there is a file where one is to be written."""
    for name in ("base", "cat_weights", "clip_vision", "lora", "full"):
        path = getattr(arguments, name)
        for output in (path, model_card.path_of(path)) if path else ():
            if output.exists():
                raise weights.WeightsError(
                    f"{output} exists already and was not touched. Give --overwrite to replace it."
                )


def _origin(file: weights.Checkpoint) -> str:
    """Where the weights come from, as far as the file knows."""
    return file.metadata.get("provenance", f"converted from {file.name}")


def _write_for_stock_loaders(
    file: weights.Checkpoint, arguments, origins: str, stages: list[TrainedStage]
) -> None:
    """Parts that ComfyUI's own loaders know."""
    metadata = {"format": "pt", "license": arguments.licence, "provenance": origins}

    def write(path: Path, tensors, *parts: str) -> None:
        trained = trained_stages.header(trained_stages.of_parts(stages, parts))
        _write(path, tensors, metadata | trained, arguments, parts)

    if arguments.base:
        base, _ = weights.split(file)
        write(arguments.base, base, "unet", "vae", "clip_text")
    if arguments.clip_vision:
        file.require("clip_vision")
        write(arguments.clip_vision, file.parts["clip_vision"], "clip_vision")
    if arguments.lora:
        file.require("unet_lora")
        write(arguments.lora, weights.flat(file.only("unet_lora")), "unet_lora")
    elif "unet_lora" in file.parts:
        print("The U-Net's LoRA is in none of the outputs: give --lora to write it, too.")


def _write_for_the_pack(
    file: weights.Checkpoint, arguments, origins: str, stages: list[TrainedStage]
) -> None:
    """Files whose header holds the architecture."""
    outputs = (
        (arguments.cat_weights, file.only("sem_inpainter", "ref_adapter")),
        (arguments.full, file.only(*weights.PREFIXES)),
    )
    for path, parts in outputs:
        if path:
            metadata = weights.cat_metadata(
                parts, file.architecture, licence=arguments.licence, provenance=origins
            )
            metadata.update(file.knowledge.header())
            metadata.update(trained_stages.header(trained_stages.of_parts(stages, parts)))
            _write(path, weights.flat(parts), metadata, arguments, tuple(parts))


def _write(
    path: Path, tensors, metadata: dict[str, str], arguments, parts: tuple[str, ...]
) -> None:
    """Write a file that holds some parts, and its model card."""
    dtype = weights.DTYPES.get(arguments.dtype)
    size = 0
    for tensor in tensors.values():
        size += tensor.numel() * (dtype or tensor.dtype).itemsize
    with _announced(f"Writing {path} ({in_units(size)})"):
        weights.save(path, tensors, metadata, dtype, arguments.overwrite)
        model_card.write(path, list(parts), metadata)


def in_units(size: int) -> str:
    """A number of bytes for people: 14.3 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def _announced(text: str) -> Iterator[None]:
    """Print what is done and how long it took; on a terminal the seconds are counted meanwhile."""
    start = time.monotonic()
    done = threading.Event()

    def count_seconds():
        while not done.wait(1):
            print(f"\r{text} ... {time.monotonic() - start:.0f} s", end="", flush=True)

    print(f"{text} ...", end="", flush=True)
    if sys.stdout.isatty():
        threading.Thread(target=count_seconds, daemon=True).start()
    ending = ""
    try:
        yield
        ending = f" done in {time.monotonic() - start:.1f} s"
    finally:
        done.set()
        print(ending, flush=True)
