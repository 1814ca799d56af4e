"""Procedural scenes for the demo model: coloured shapes on textured backgrounds, one of them the object to inpaint.

    python tools/scenes.py OUT --split train --count 1000 --size 128
    python tools/scenes.py --split test --count 40 --sheet sheet.png

A scene is a pure function of its seed. Seeds are divided into splits; the pairs in HELD_OUT never occur in training,
so a test on them tells whether shape and colour were learned apart from each other.
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

from demo_model.drawing import BACKGROUNDS, COLOURS, SHAPES, Outline, background, paint

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
_SIZES = (0.28, 0.48)  # longer side of an object's bounding box
_SHEET = 64  # scenes on a contact sheet


@dataclass(frozen=True)
class Scene:
    """A picture and its target: the object in front of all others, fully visible."""

    seed: int
    image: np.ndarray  # (S, S, 3) uint8
    without: np.ndarray  # (S, S, 3) uint8, the same scene without the target
    mask: (
        np.ndarray
    )  # (S, S) uint8, the target's antialiased silhouette: how much of a pixel it covers
    objects: (
        np.ndarray
    )  # (S, S) uint8, which object shows in a pixel: 0 none, then 1 + its place in `labels`
    box: tuple[
        float, float, float, float
    ]  # x0, y0, x1, y1 around the mask, fractions on pixel borders
    shape: str
    colour: str
    labels: tuple[str, ...]  # of all objects, the target first, then back to front
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
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(
        f"seed {seed} belongs to no split; expected one of "
        + ", ".join(f"{seeds.start} to {seeds.stop - 1} ({name})" for name, seeds in SPLITS.items())
    )


def scene(seed: int, size: int = 128) -> Scene:
    """The scene of a seed, `size` pixels wide and high. Its composition is the same at every size."""
    split = split_of(seed)
    if size < 32:
        raise ValueError(
            f"a scene {size} pixels wide is too small to show its objects; ask for 32 or more"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    objects = []  # (shape, colour), outline, x, y; the target first
    for pair in _pairs(split, rng):
        outline = Outline.draw(pair[0], _SIZES[0] + (_SIZES[1] - _SIZES[0]) * rng.random(), rng)
        objects.append((pair, outline, *_place(outline, objects, rng)))
    family = _choose(BACKGROUNDS, rng)
    picture = background(family, rng, size)
    shows = np.zeros((size, size), np.uint8)
    for place, (pair, outline, x, y) in enumerate(objects[1:], 2):
        shows[paint(picture, outline, x, y, _tint(pair[1], rng)) > 127] = place
    without = picture.copy()
    (shape, colour), outline, x, y = objects[0]
    mask = paint(picture, outline, x, y, _tint(colour, rng))
    shows[mask > 127] = 1
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    box = tuple(int(edge) / size for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return Scene(
        seed,
        picture,
        without,
        mask,
        shows,
        box,
        shape,
        colour,
        tuple(f"{colour} {shape}" for (shape, colour), *_ in objects),
        _caption(objects, family),
    )


def holes(scene: Scene, kind: str) -> np.ndarray:
    """The hole to inpaint, (S, S) uint8, 255 = repaint: CAT-Diffusion trains on half of each kind.

    "exact" is every pixel that the target touches, dilated by 3x3; "box" is its bounding box, filled.
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


# Composition ------------------------------------------------------------------------------------------------------


def _choose(items, rng: np.random.Generator):
    return items[int(rng.random() * len(items))]


def _pairs(split: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Shape and colour of 2 to 4 objects, all different, the target first."""
    target, others = _ALLOWED[split]
    pairs = [_choose(target, rng)]
    count = 2 + int(3 * rng.random())
    while len(pairs) < count:
        pairs.append(_choose([pair for pair in others if pair not in pairs], rng))
    return pairs


def _place(outline: Outline, placed: list, rng: np.random.Generator) -> tuple[float, float]:
    """Where the outline's origin goes: the target well inside the picture, others so that most of each shows."""
    x0, y0, x1, y1 = outline.bounds
    margin = -0.08 if placed else 0.03
    best, position = -1.0, None
    for _ in range(12):
        x = margin - x0 + (1 - 2 * margin - x1 + x0) * rng.random()
        y = margin - y0 + (1 - 2 * margin - y1 + y0) * rng.random()
        room = min(
            (
                math.sqrt((x - u) * (x - u) + (y - v) * (y - v)) / (_reach(outline) + _reach(other))
                for _, other, u, v in placed
            ),
            default=1.0,
        )
        if room > best:
            best, position = room, (x, y)
        if best > 0.8:  # circles would overlap by a fifth at most
            break
    return position


def _reach(outline: Outline) -> float:
    x0, y0, x1, y1 = outline.bounds
    return max(x1 - x0, y1 - y0) / 2


def _tint(colour: str, rng: np.random.Generator) -> tuple[float, ...]:
    return tuple(value + 16 * (rng.random() - 0.5) for value in COLOURS[colour])


def _caption(objects: list, family: str) -> str:
    """A sentence such as "a red star above a blue ring and left of a pink heart on a striped background"."""
    (shape, colour), _, x, y = objects[0]
    others = []
    for (other_shape, other_colour), _, u, v in objects[1:]:
        across, along = u - x, v - y
        beside = abs(across) > abs(along)
        side = (
            ("left of" if across > 0 else "right of")
            if beside
            else ("above" if along > 0 else "below")
        )
        others.append(f"{side} {_with_article(other_colour)} {other_shape}")
    relations = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
    return f"{_with_article(colour)} {shape} {relations} on a {family} background"


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# Files ------------------------------------------------------------------------------------------------------------


def write(folder: str | os.PathLike, seeds: Iterable[int], size: int = 128) -> Path:
    """Write pictures, masks and manifest.jsonl, one object a line; the manifest returned is complete or absent.

    A mask is white in every pixel that its object touches.
    """
    folder, seeds = Path(folder), list(seeds)
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        raise ValueError(f"{manifest} exists already and was not touched. Choose another folder.")
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    partial = folder / "manifest.jsonl.partial"
    with partial.open("w", encoding="utf-8") as lines:
        for done, seed in enumerate(seeds, 1):
            s = scene(seed, size)
            line = {
                "id": f"{seed:08d}",
                "image": f"images/{seed:08d}.png",
                "mask": f"masks/{seed:08d}.png",
                "box": s.box,
                "label": s.label,
                "split": s.split,
            }
            if done % 5 == 0:  # the official data has long captions for a fifth of its pictures
                line["caption"] = s.caption
            Image.fromarray(s.image).save(folder / line["image"])
            Image.fromarray(_touched(s)).save(folder / line["mask"])
            lines.write(json.dumps(line) + "\n")
            if done % 100 == 0 or done == len(seeds):
                print(
                    f"\r{done}/{len(seeds)} scenes",
                    end="\n" if done == len(seeds) else "",
                    flush=True,
                )
    partial.replace(manifest)
    return manifest


def sheet(seeds: Iterable[int], size: int = 128) -> Image.Image:
    """A contact sheet, eight scenes a row: target outlined, label written below."""
    seeds, caption = list(seeds), 14
    picture = Image.new("RGB", (8 * size, math.ceil(len(seeds) / 8) * (size + caption)), "black")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default_imagefont()
    for index, seed in enumerate(seeds):
        s, x, y = scene(seed, size), index % 8 * size, index // 8 * (size + caption)
        edge = holes(s, "exact")
        edge = edge > np.asarray(Image.fromarray(edge).filter(ImageFilter.MinFilter(3)))
        picture.paste(
            Image.fromarray(np.where(edge[..., None], np.uint8([0, 255, 255]), s.image)), (x, y)
        )
        pen.text((x + 3, y + size + 1), s.label, fill="white", font=font)
    return picture


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
    seeds = SPLITS[arguments.split][: max(arguments.count, 0)]
    if len(seeds) != arguments.count or not seeds:
        parser.error(
            f"--count {arguments.count}: {arguments.split} has 1 to {len(SPLITS[arguments.split])} scenes"
        )
    try:
        if arguments.sheet:
            sheet(seeds[:_SHEET], arguments.size).save(arguments.sheet)
        if arguments.folder:
            write(arguments.folder, seeds, arguments.size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
