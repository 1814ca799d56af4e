"""Procedural scenes for the demo model: coloured shapes on textures, one of them to inpaint.

    python tools/run.py demo_model.scenes OUT --split train --count 1000 --size 128
    python tools/run.py demo_model.scenes --split test --count 40 --sheet sheet.png

A scene is a pure function of its seed. Seeds are divided into splits; the pairs in HELD_OUT never
occur in training, so a test on them tells whether shape and colour were learned apart from each
other.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cat_diffusion.cat_core.files import replacing
from demo_model import composition
from demo_model.drawing import BACKGROUNDS, COLOURS, SHAPES, background

TRAIN = range(0, 10_000_000)
VALIDATION = range(10_000_000, 10_100_000)
TEST = range(10_100_000, 10_200_000)
HELD_OUT_TEST = range(10_200_000, 10_300_000)
JUDGE = range(20_000_000, 30_000_000)  # for the independent classifier only
SPLITS = {
    "train": TRAIN,
    "validation": VALIDATION,
    "test": TEST,
    "held-out": HELD_OUT_TEST,
    "judge": JUDGE,
}

COLOUR_NAMES = tuple(COLOURS)
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOUR_NAMES)
HELD_OUT = (
    ("star", "green"),
    ("heart", "blue"),
    ("square", "orange"),
    ("ring", "purple"),
    ("triangle", "pink"),
    ("crescent", "red"),
)
KNOWN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
# Split -> the pairs that its targets and its other objects may have.
_ALLOWED = {
    "train": (KNOWN, KNOWN),
    "validation": (KNOWN, KNOWN),
    "test": (KNOWN, KNOWN),
    "held-out": (HELD_OUT, PAIRS),
    "judge": (PAIRS, PAIRS),
}
_SHEET = 64  # scenes on a contact sheet, at most
_ACROSS = 8  # of them side by side
_CAPTION = 14  # pixels, height of the label below each


@dataclass(frozen=True)
class Scene:
    """A picture and its target: the object in front of all others, fully visible.

    Attributes:
        image: (S, S, 3) uint8.
        without: (S, S, 3) uint8, the same scene without the target.
        mask: (S, S) uint8, the target's antialiased silhouette: how much of a pixel it covers.
        objects: (S, S) uint8, which object shows in a pixel: 0 none, else 1 + its place in
            `labels`.
        box: x0, y0, x1, y1 around the mask, fractions on pixel borders.
        labels: of all objects, the target first, then back to front.
    """

    seed: int
    image: np.ndarray
    without: np.ndarray
    mask: np.ndarray
    objects: np.ndarray
    box: tuple[float, float, float, float]
    shape: str
    colour: str
    labels: tuple[str, ...]
    caption: str

    @property
    def label(self) -> str:
        """The target, such as "red star"."""
        return self.labels[0]

    @property
    def split(self) -> str:
        """The name of the split that the seed belongs to."""
        return split_of(self.seed)


def split_of(seed: int) -> str:
    """The split that a seed belongs to."""
    expected = []
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
        expected.append(f"{seeds.start} to {seeds.stop - 1} ({name})")
    raise ValueError(f"seed {seed} belongs to no split; expected one of {', '.join(expected)}")


def scene(seed: int, size: int = 128) -> Scene:
    """The scene of a seed, `size` pixels wide and high.

    Its composition is the same at every size.
    """
    split = split_of(seed)
    if size < 32:
        raise ValueError(
            f"a scene {size} pixels wide is too small to show its objects; ask for 32 or more"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    placed = composition.compose(*_ALLOWED[split], rng)
    target, *others = placed
    family = composition.choose(BACKGROUNDS, rng)
    image = background(family, rng, size)
    objects = np.zeros((size, size), np.uint8)
    for number, other in enumerate(others, 2):
        silhouette = other.paint_over(image, rng)
        objects[silhouette > 127] = number
    without = image.copy()
    mask = target.paint_over(image, rng)
    objects[mask > 127] = 1
    return Scene(
        seed=seed,
        image=image,
        without=without,
        mask=mask,
        objects=objects,
        box=_box(mask),
        shape=target.shape,
        colour=target.colour,
        labels=tuple(f"{each.colour} {each.shape}" for each in placed),
        caption=composition.caption(target, others, family),
    )


def holes(scene: Scene, kind: str) -> np.ndarray:
    """The hole to inpaint, (S, S) uint8, 255 = repaint: CAT-Diffusion trains on half of each kind.

    "exact" is every pixel that the target touches, dilated by 3x3; "box" is its bounding box,
    filled.
    """
    if kind == "exact":
        return np.asarray(Image.fromarray(_touched(scene)).filter(ImageFilter.MaxFilter(3)))
    if kind == "box":
        hole = np.zeros_like(scene.mask)
        x0, y0, x1, y1 = (round(edge * len(hole)) for edge in scene.box)
        hole[y0:y1, x0:x1] = 255
        return hole
    raise ValueError(f'a hole is "exact" or "box", not "{kind}"')


def _touched(scene: Scene) -> np.ndarray:
    return np.where(scene.mask > 0, 255, 0).astype(np.uint8)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 around what is not 0, as fractions of the side."""
    size = len(mask)
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    x0 = int(columns[0]) / size
    y0 = int(rows[0]) / size
    x1 = int(columns[-1] + 1) / size
    y1 = int(rows[-1] + 1) / size
    return x0, y0, x1, y1


# Files --------------------------------------------------------------------------------------------


def write(folder: str | os.PathLike, seeds: Iterable[int], size: int = 128) -> Path:
    """Write pictures, masks and manifest.jsonl, one object a line.

    A mask is white in every pixel that its object touches.

    Returns:
        the manifest, which is complete or absent.

    Raises:
        ValueError: there is a manifest already.
    """
    folder = Path(folder)
    seeds = list(seeds)
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        raise ValueError(f"{manifest} exists already and was not touched. Choose another folder.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    with replacing(manifest) as partial, partial.open("w", encoding="utf-8") as lines:
        for done, seed in enumerate(seeds, 1):
            # The official data has long captions for a fifth of its pictures.
            record = _write_scene(folder, scene(seed, size), with_caption=done % 5 == 0)
            lines.write(json.dumps(record) + "\n")
            is_last = done == len(seeds)
            if done % 100 == 0 or is_last:
                end = "\n" if is_last else ""
                print(f"\r{done}/{len(seeds)} scenes", end=end, flush=True)
    return manifest


def _write_scene(folder: Path, drawn: Scene, *, with_caption: bool) -> dict:
    """Write a scene's picture and mask; returns its line of the manifest."""
    name = f"{drawn.seed:08d}"
    record = {
        "id": name,
        "image": f"images/{name}.png",
        "mask": f"masks/{name}.png",
        "box": drawn.box,
        "label": drawn.label,
        "split": drawn.split,
    }
    if with_caption:
        record["caption"] = drawn.caption
    Image.fromarray(drawn.image).save(folder / record["image"])
    Image.fromarray(_touched(drawn)).save(folder / record["mask"])
    return record


def scene_sheet(seeds: Iterable[int], size: int = 128) -> Image.Image:
    """A contact sheet, eight scenes a row: target outlined, label written below."""
    seeds = list(seeds)
    height = size + _CAPTION
    sheet = Image.new("RGB", (_ACROSS * size, math.ceil(len(seeds) / _ACROSS) * height), "black")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default_imagefont()
    for number, seed in enumerate(seeds):
        drawn = scene(seed, size)
        row, column = divmod(number, _ACROSS)
        x = column * size
        y = row * height
        sheet.paste(_outlined(drawn), (x, y))
        pen.text((x + 3, y + size + 1), drawn.label, fill="white", font=font)
    return sheet


def _outlined(drawn: Scene) -> Image.Image:
    """The picture with a line around its target."""
    hole = holes(drawn, "exact")
    inside = np.asarray(Image.fromarray(hole).filter(ImageFilter.MinFilter(3)))
    edge = (hole > inside)[..., None]
    return Image.fromarray(np.where(edge, np.uint8([0, 255, 255]), drawn.image))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="OUT",
        help="write pictures, masks and manifest.jsonl here",
    )
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "--count", type=int, default=_SHEET, help="number of scenes, from the split's first seed on"
    )
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help=f"write a contact sheet of the scenes, {_SHEET} at most",
    )
    arguments = parser.parse_args()
    if not (arguments.folder or arguments.sheet):
        parser.error("nothing to write: give a folder or --sheet")
    all_seeds = SPLITS[arguments.split]
    seeds = all_seeds[: max(arguments.count, 0)]
    if len(seeds) != arguments.count or not seeds:
        parser.error(
            f"--count {arguments.count}: {arguments.split} has 1 to {len(all_seeds)} scenes"
        )
    try:
        if arguments.sheet:
            scene_sheet(seeds[:_SHEET], arguments.size).save(arguments.sheet)
        if arguments.folder:
            write(arguments.folder, seeds, arguments.size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
