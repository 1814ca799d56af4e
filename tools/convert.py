"""Convert CAT-Diffusion checkpoints: official file in, safetensors out, for this pack and for stock loaders.

    python tools/convert.py official.ckpt --base sd15_cat_inpainting.safetensors --cat-weights cat.safetensors
    python tools/convert.py sd15_inpainting.safetensors clip_vision.safetensors cat.safetensors --full cat_full.safetensors

Run it with ComfyUI's Python (it needs torch and safetensors). Outputs are written to a temporary name and renamed;
nothing is overwritten unless --overwrite is given. Memory: the checkpoint is mapped, not loaded, where the format allows.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="+", help="official checkpoint (.ckpt or .safetensors), CAT weights, "
                        "SD 1.5 inpainting checkpoint, CLIP vision file; of parts that several have, the last one's is taken")
    parser.add_argument("--base", type=Path, metavar="OUT",
                        help="write U-Net, VAE and text encoder as an ordinary SD 1.5 inpainting checkpoint")
    parser.add_argument("--cat-weights", type=Path, metavar="OUT",
                        help="write SemInpainter and/or RefAdapter as a CAT weights file")
    parser.add_argument("--clip-vision", type=Path, metavar="OUT",
                        help="write the image encoder for ComfyUI's Load CLIP Vision")
    parser.add_argument("--full", type=Path, metavar="OUT", help="write everything as one safetensors checkpoint")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="store as this type (default: as it is)")
    parser.add_argument("--licence", default="unknown", help="licence of the weights, for the header")
    parser.add_argument("--inert-objects", action="store_true",
                        help="read a pickle with foreign Python objects by dropping them; nothing in it is run")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    arguments = parser.parse_args()
    outputs = [path for path in (arguments.base, arguments.cat_weights, arguments.clip_vision, arguments.full) if path]
    if not outputs:
        parser.error("nothing to write: give --base, --cat-weights, --clip-vision or --full")
    if wrong := [path for path in outputs if path.suffix.lower() != ".safetensors"]:
        parser.error(f"{wrong[0]} must end in .safetensors")
    if len({path.absolute() for path in outputs}) < len(outputs):
        parser.error("two outputs have the same name")
    sys.path.insert(0, str(ROOT))
    try:
        from cat_core import weights
    except ModuleNotFoundError as error:
        parser.error(f"{sys.executable} has no {error.name}; run this with ComfyUI's Python")
    try:
        return convert(weights, arguments)
    except weights.WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def convert(weights, arguments) -> int:
    """Read, check, split, write."""
    for path in filter(None, (arguments.base, arguments.cat_weights, arguments.clip_vision, arguments.full)):
        if path.exists() and not arguments.overwrite:
            raise weights.WeightsError(f"{path} exists already and was not touched. Give --overwrite to replace it.")
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
        parts = {part: file.parts[part] for part in ("sem_inpainter", "ref_adapter") if part in file.parts}
        save(arguments.cat_weights, weights.flat(parts), weights.cat_metadata(parts, file.architecture, **header))
    if arguments.full:
        save(arguments.full, weights.flat(file.parts), weights.cat_metadata(file.parts, file.architecture, **header))
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped; nothing half-written was left.")
