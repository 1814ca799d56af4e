"""Make the pictures that the demo model shows its work on, with their holes.

    python tools/run.py release.demo_photos --world FOLDER

Each is a photograph in the public domain that no training saw, with a few things of the demo
model's world set into it, in one style and one light.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from comfyui import ROOT

_SHADOW = 0.45
_SHADOW_SHIFT = 0.06  # of a thing's size, away from the light
_SHADOW_BLUR = 0.03
_SHADING = 0.22  # how much brighter a thing is at its edge towards the light
_BRIGHTNESS = 0.95
_LIGHT = math.radians(120)  # from the right, upwards
_WAIST = 0.45  # of a star's outer radius


@dataclass(frozen=True)
class Thing:
    """What is set into a photograph; lengths in pixels, the angle in degrees."""

    name: str
    centre: tuple[int, int]
    side: int
    angle: float = 0.0


@dataclass(frozen=True)
class Hole:
    """Where something is to be painted.

    Attributes:
        kind: "box", "ellipse" or "star".
        box: left, top, right, lower.
    """

    kind: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Photograph:
    """What is made of one.

    Attributes:
        title: as photographs.json has it.
        part: left, top, right, lower of what is used of it.
        size: that it is scaled to.
        style: of all things.
    """

    title: str
    part: tuple[int, int, int, int]
    size: tuple[int, int]
    style: str
    things: tuple[Thing, ...]


TEMPLE = Photograph(
    title="Konark Sun Temple Front view",
    part=(127, 240, 727, 640),
    size=(768, 512),
    style="3d",
    things=(
        Thing("teddy bear", (228, 372), 150, -6),
        Thing("books", (574, 372), 150, 4),
    ),
)
HILL = Photograph(
    title="Carcassonne - la Cité",
    part=(100, 240, 500, 640),
    size=(256, 256),
    style="3d",
    things=(Thing("teddy bear", (44, 200), 76, -6), Thing("basket", (214, 192), 76, 4)),
)
MEADOW = Photograph(
    title="Nokota Horse Stud Band",
    part=(420, 73, 987, 640),
    size=(256, 256),
    style="flat",
    things=(Thing("sheep", (46, 208), 80), Thing("cow", (214, 204), 84)),
)
GREAT_WALL = Photograph(
    title="Great Wall of China July 2006",
    part=(216, 0, 856, 640),
    size=(256, 256),
    style="noto",
    things=(Thing("camera", (128, 214), 70, -6),),
)
DEMO_PHOTO = (TEMPLE, Hole("box", (310, 272, 492, 454)))
SCENES = {
    "square hole": (HILL, Hole("box", (82, 120, 178, 216))),
    "star-shaped hole": (MEADOW, Hole("star", (76, 92, 186, 202))),
    "two holes, the lower": (GREAT_WALL, Hole("ellipse", (156, 140, 248, 232))),
    "two holes, the upper": (GREAT_WALL, Hole("box", (10, 40, 98, 128))),
}


class Sources:
    """Things and photographs of a folder that `world_sources` filled."""

    def __init__(self, folder: Path):
        self.folder = folder
        things = json.loads((folder / "things.json").read_text("utf-8"))
        self.numbers = {fact["english"]: fact["index"] for fact in things}
        self.photographs = json.loads((folder / "photographs.json").read_text("utf-8"))

    def picture(self, made: Photograph) -> Image.Image:
        """A photograph with its things."""
        (fact,) = [fact for fact in self.photographs if fact["title"].startswith(made.title)]
        if not fact["held_out"] or fact["licence"] != "public domain":
            raise ValueError(f"{made.title} is not held out, or not in the public domain")
        with Image.open(self.folder / "photographs" / fact["file"]) as file:
            part = file.convert("RGB").crop(made.part)
        photograph = np.asarray(part.resize(made.size, Image.Resampling.LANCZOS)) / 255
        mean = photograph.mean((0, 1))
        tint = _BRIGHTNESS * (1 + 0.35 * (mean / mean.mean() - 1))
        for thing in made.things:
            photograph = self._with(photograph, thing, made.style, tint)
        return Image.fromarray((photograph * 255).round().astype(np.uint8))

    def _with(
        self, photograph: np.ndarray, thing: Thing, style: str, tint: np.ndarray
    ) -> np.ndarray:
        """A thing and its shadow over a photograph (H, W, 3) in [0, 1]."""
        path = self.folder / f"things/{style}/{self.numbers[thing.name]:03}.png"
        with Image.open(path) as file:
            drawing = file.convert("RGBA").rotate(thing.angle, Image.Resampling.BICUBIC)
        side = thing.side
        drawing = np.asarray(drawing.resize((side, side), Image.Resampling.LANCZOS)) / 255
        light = math.cos(_LIGHT), -math.sin(_LIGHT)  # x and y, downwards
        place = np.linspace(-1, 1, side)
        slope = (place * light[0] + place[:, None] * light[1]).clip(-1, 1)
        colour = drawing[..., :3] * (1 + _SHADING * slope[..., None]) * tint
        layer = np.zeros((*photograph.shape[:2], 4))
        left, top = (middle - side // 2 for middle in thing.centre)
        layer[top : top + side, left : left + side] = np.dstack(
            (colour.clip(0, 1), drawing[..., 3])
        )
        covered = Image.fromarray((layer[..., 3] * 255).astype(np.uint8))
        shadow = np.asarray(covered.filter(ImageFilter.GaussianBlur(_SHADOW_BLUR * side))) / 255
        shift = [round(-_SHADOW_SHIFT * side * along) for along in reversed(light)]
        shaded = photograph * (1 - _SHADOW * np.roll(shadow, shift, (0, 1))[..., None])
        alpha = layer[..., 3:]
        return layer[..., :3] * alpha + shaded * (1 - alpha)


def mask(hole: Hole, size: tuple[int, int]) -> Image.Image:
    """White where something is to be painted."""
    picture = Image.new("L", size)
    pen = ImageDraw.Draw(picture)
    if hole.kind == "box":
        pen.rectangle(hole.box, fill=255)
    elif hole.kind == "ellipse":
        pen.ellipse(hole.box, fill=255)
    else:
        pen.polygon(_star(hole.box), fill=255)
    return picture


def _star(box: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    left, top, right, lower = box
    corners = []
    for number in range(10):
        angle = math.pi * number / 5
        radius = _WAIST if number % 2 else 1.0
        across = left + (1 + radius * math.sin(angle)) * (right - left) / 2
        corners.append((across, top + (1 - radius * math.cos(angle)) * (lower - top) / 2))
    return corners


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of things, photographs")
    sources = Sources(parser.parse_args().world)
    made, hole = DEMO_PHOTO
    folder = ROOT / "web/photographs/temple"
    folder.mkdir(parents=True, exist_ok=True)
    sources.picture(made).save(folder / "photo.jpg", quality=90, subsampling=0)
    mask(hole, made.size).save(folder / "mask.png", optimize=True)
    for name, (made, hole) in SCENES.items():
        scene = sources.picture(made)
        scene.putalpha(ImageOps.invert(mask(hole, made.size)))
        scene.save(ROOT / f"web/scenes/{name}.png", optimize=True)
    return 0
