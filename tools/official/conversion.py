"""Official checkpoints in, safetensors out: for this pack and for stock loaders."""

import sys
import threading
import time

from cat_diffusion.cat_core import weights


def command(arguments) -> int:
    """Convert as the arguments say; returns the exit code."""
    try:
        return convert(arguments)
    except weights.WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def convert(arguments) -> int:
    """Read, check, split, write."""
    for path in filter(
        None, (arguments.base, arguments.cat_weights, arguments.clip_vision, arguments.full)
    ):
        if path.exists() and not arguments.overwrite:
            raise weights.WeightsError(
                f"{path} exists already and was not touched. Give --overwrite to replace it."
            )
    dtype = weights.DTYPES.get(arguments.dtype)
    files = []
    for path in arguments.checkpoint:
        with _step(f"Reading and checking {path}"):
            files.append(weights.read(path, inert_objects=arguments.inert_objects))
    file = weights.merge(files)
    print(f"Found {weights.describe(file.parts)}.")
    origins = [part.metadata.get("provenance", f"converted from {part.name}") for part in files]
    header = {"licence": arguments.licence, "provenance": "; ".join(origins)}

    def save(path, tensors, metadata):
        size = sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors.values()) / 1e9
        with _step(f"Writing {path} ({size:.2f} GB)"):
            weights.save(path, tensors, metadata, dtype, arguments.overwrite)

    plain = {"format": "pt", "license": header["licence"], "provenance": header["provenance"]}
    if arguments.base:
        save(arguments.base, weights.split(file)[0], plain)
    if arguments.clip_vision:
        file.require("clip_vision")
        save(arguments.clip_vision, file.parts["clip_vision"], plain)
    if arguments.cat_weights:
        parts = {
            part: file.parts[part]
            for part in ("sem_inpainter", "ref_adapter")
            if part in file.parts
        }
        save(
            arguments.cat_weights,
            weights.flat(parts),
            weights.cat_metadata(parts, file.architecture, **header),
        )
    if arguments.full:
        save(
            arguments.full,
            weights.flat(file.parts),
            weights.cat_metadata(file.parts, file.architecture, **header),
        )
    return 0


class _step:
    """Print what is done, how long it has been going on (on a terminal), and how long it took."""

    def __init__(self, text: str):
        self.text = text

    def __enter__(self):
        self.start, self.done = time.monotonic(), threading.Event()
        print(f"{self.text} ...", end="", flush=True)
        if sys.stdout.isatty():
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self):
        while not self.done.wait(1):
            print(f"\r{self.text} ... {time.monotonic() - self.start:.0f} s", end="", flush=True)

    def __exit__(self, kind, *_):
        self.done.set()
        print("" if kind else f" done in {time.monotonic() - self.start:.1f} s", flush=True)
