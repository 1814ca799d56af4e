"""The world of the demo model: named things drawn into photographs, a batch at a time.

Everything is drawn on the device that trains. The things of a picture share a style and a light, so
that what stands around a hole tells what the name of the missing thing does not.

Shapes: B pictures, K things of a picture (the target first), S the side of a picture.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cat_diffusion.cat_core.files import replacing
from demo_model.world_sources import STYLES, is_held_out

SIZE = 192  # pixels, side of a picture
MOST_THINGS = 4  # in a picture
NO_THING = -1
_THING = 192  # pixels, side of a thing's drawing
_TARGET_SIZES = (0.42, 0.7)  # longer side of the target, as a share of the picture's
_OTHER_SIZES = (0.28, 0.46)  # of the things around it, which are drawn from half-size drawings
_PHOTO_HEIGHT = 640  # pixels that are kept of a photograph
_PHOTO_WIDTH = 960
_TRIES = 12  # places that are tried for each further thing
_SHADING = 0.22  # how much brighter a thing is at its edge towards the light
_SHADOW = 0.45
_SHADOW_SHIFT = 0.06  # away from the light, as a share of a thing's size
_SHADOW_BLUR = 7  # pixels
_FINE = 3  # places a row and a column of each pixel that a photograph is read at


@dataclass(frozen=True)
class World:
    """What pictures are made of.

    Attributes:
        drawings: (3, N, 4, 192, 192) uint8, premultiplied RGBA by style and thing.
        small_drawings: the same at half the size.
        names: English and Chinese name of each thing.
        photographs: (P, 640, 960, 3) uint8.
        photograph_sizes: (P, 2) int64, height and width of what is filled of each.
        held_out: (P,) bool, photographs that no training sees.
    """

    drawings: torch.Tensor
    small_drawings: torch.Tensor
    names: Sequence[tuple[str, str]]
    photographs: torch.Tensor
    photograph_sizes: torch.Tensor
    held_out: np.ndarray

    def to(self, device: torch.device | str) -> "World":
        """The same world on a device."""
        return World(
            self.drawings.to(device),
            self.small_drawings.to(device),
            self.names,
            self.photographs.to(device),
            self.photograph_sizes,
            self.held_out,
        )


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures; colours and masks in [0, 1].

    Attributes:
        whole: (B, 3, S, S), with all its things.
        without: (B, 3, S, S), without the target and its shadow.
        shown: (B, K, S, S), how much of each pixel a thing covers that one sees.
        target: (B, 1, S, S), the target's silhouette, hidden parts included.
        things: (B, K) int64 on the CPU, NO_THING where there are fewer.
        style: (B,) int64 on the CPU.
        longer_side: (B,) on the CPU, the target's, as a share of the picture's.
    """

    whole: torch.Tensor
    without: torch.Tensor
    shown: torch.Tensor
    target: torch.Tensor
    things: torch.Tensor
    style: torch.Tensor
    longer_side: torch.Tensor


def load(folder: Path) -> World:
    """The world of a folder that `world_sources.fetch` filled."""
    facts = json.loads((folder / "things.json").read_text("utf-8"))
    facts.sort(key=lambda fact: fact["index"])
    drawings = np.empty((len(STYLES), len(facts), _THING, _THING, 4), np.uint8)
    for style_number, style in enumerate(STYLES):
        paths = [folder / f"things/{style}/{number:03}.png" for number in range(len(facts))]
        with ThreadPoolExecutor() as threads:
            for number, drawing in enumerate(threads.map(_rgba, paths)):
                drawings[style_number, number] = drawing
    straight = rearrange(torch.from_numpy(drawings), "s n h w c -> s n c h w")
    premultiplied = _premultiplied(straight)
    pictures = json.loads((folder / "photographs.json").read_text("utf-8"))
    shape = (len(pictures), _PHOTO_HEIGHT, _PHOTO_WIDTH, 3)
    photographs = torch.zeros(shape, dtype=torch.uint8)
    sizes = torch.zeros(len(pictures), 2, dtype=torch.int64)
    for number, fact in enumerate(pictures):
        photograph = _photograph(folder / "photographs" / fact["file"])
        height, width, _ = photograph.shape
        photographs[number, :height, :width] = photograph
        sizes[number] = torch.tensor([height, width])
    return World(
        drawings=premultiplied,
        small_drawings=_halved(premultiplied),
        names=[(fact["english"], fact["chinese"]) for fact in facts],
        photographs=photographs,
        photograph_sizes=sizes,
        held_out=np.array([fact["held_out"] for fact in pictures]),
    )


def _rgba(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGBA"))


def _premultiplied(straight: torch.Tensor) -> torch.Tensor:
    """(S, N, 4, h, w) uint8, colours times alpha; a style at a time, to save memory."""
    result = straight.clone()
    for drawings in result:
        for drawing in drawings:
            alpha = drawing[3:].float() / 255
            drawing[:3] = (drawing[:3] * alpha).round().to(torch.uint8)
    return result


def _halved(drawings: torch.Tensor) -> torch.Tensor:
    halves = []
    for of_style in drawings:
        halves.append(F.avg_pool2d(of_style.float(), 2).round().to(torch.uint8))
    return torch.stack(halves)


def _photograph(path: Path) -> torch.Tensor:
    """(H, W, 3) uint8, not larger than what is kept: its middle."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    scale = _PHOTO_HEIGHT / min(picture.size)
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    levels = torch.from_numpy(np.array(picture))
    height, width, _ = levels.shape
    top = max(height - _PHOTO_HEIGHT, 0) // 2
    left = max(width - _PHOTO_WIDTH, 0) // 2
    return levels[top : top + _PHOTO_HEIGHT, left : left + _PHOTO_WIDTH]


# Drawing ------------------------------------------------------------------------------------------


class Painter:
    """Draws the pictures of a world; the same seed draws the same pictures.

    Args:
        photographs: indices of the photographs that it may use.
        targets: "trained" pairs of thing and style, "held out" ones, or "any".
    """

    def __init__(self, world: World, photographs: Sequence[int], targets: str = "trained"):
        self.world = world
        self.photographs = np.asarray(photographs)
        self.targets = targets
        self.device = world.drawings.device

    def paint(self, count: int, seed: int) -> Pictures:
        """A batch of pictures."""
        rng = np.random.default_rng(seed)
        generator = torch.Generator(self.device).manual_seed(seed)
        plan = _Plan.draw(rng, count, len(self.world.names), self.targets)
        background = self._background(rng, count)
        tint = self._tint(background, plan)
        canvas = background
        without = background
        shown = background.new_zeros(count, MOST_THINGS, SIZE, SIZE)
        target = background.new_zeros(count, 1, SIZE, SIZE)
        for slot in plan.order:
            layer, shadow = self._layer(plan, slot, tint)
            alpha = layer[:, 3:]
            canvas = _over(layer, shadow, canvas)
            shown = shown * (1 - alpha)
            if slot == 0:
                target = alpha
            else:
                without = _over(layer, shadow, without)
            shown[:, slot] = alpha[:, 0]
        grain = 0.01 * torch.randn(canvas.shape, device=self.device, generator=generator)
        return Pictures(
            whole=(canvas + grain).clamp(0, 1),
            without=(without + grain).clamp(0, 1),
            shown=shown,
            target=target,
            things=torch.from_numpy(plan.things),
            style=torch.from_numpy(plan.style),
            longer_side=torch.from_numpy(plan.sizes[:, 0]),
        )

    def _background(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        """Crops of photographs (B, 3, S, S): of any scale, mirrored half the time."""
        index = rng.choice(self.photographs, count)
        sizes = self.world.photograph_sizes[index].numpy()
        side = np.exp(rng.uniform(np.log(SIZE), np.log(sizes.min(1))))
        corner = rng.uniform(0, 1, (count, 2)) * (sizes - side[:, None])
        place = (np.arange(_FINE * SIZE) + 0.5) / (_FINE * SIZE)
        rows = corner[:, :1] + side[:, None] * place
        mirrored = rng.random((count, 1)) < 0.5
        columns = corner[:, 1:] + side[:, None] * np.where(mirrored, 1 - place, place)
        pixels = self.world.photographs[
            self._index(index).view(-1, 1, 1),
            self._index(rows).unsqueeze(2),
            self._index(columns).unsqueeze(1),
        ]
        levels = rearrange(pixels, "b h w c -> b c h w").float()
        return F.avg_pool2d(levels, _FINE) / 255

    def _index(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.device)

    def _numbers(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers.astype(np.float32)).to(self.device)

    def _tint(self, background: torch.Tensor, plan: "_Plan") -> torch.Tensor:
        """The light's colour (B, 3, 1, 1): partly the photograph's own."""
        mean = background.mean((2, 3), keepdim=True)
        own = mean / mean.mean(1, keepdim=True).clamp(min=0.05)
        return (1 + 0.35 * (own - 1)) * self._numbers(plan.brightness).view(-1, 1, 1, 1)

    def _layer(self, plan: "_Plan", slot: int, tint: torch.Tensor) -> tuple:
        """A slot's things as they stand in their pictures, premultiplied (B, 4, S, S).

        And their shadows (B, 1, S, S).
        """
        source = self.world.small_drawings if slot else self.world.drawings
        thing = self._index(np.maximum(plan.things[:, slot], 0))
        drawings = source[self._index(plan.style), thing].float() / 255
        drawings *= self._numbers(plan.things[:, slot] >= 0).view(-1, 1, 1, 1)
        layer = self._placed(drawings, plan.placement(slot))
        alpha = layer[:, 3:].clamp(0, 1)
        colour = layer[:, :3] * self._shading(plan, slot) * tint
        colour = torch.minimum(colour, alpha)  # premultiplied
        shadow = self._placed(drawings[:, 3:], plan.placement(slot, _SHADOW_SHIFT))
        for _ in range(2):
            shadow = F.avg_pool2d(shadow, _SHADOW_BLUR, 1, _SHADOW_BLUR // 2)
        return torch.cat((colour, alpha), dim=1), _SHADOW * shadow

    def _placed(self, drawings: torch.Tensor, placement: np.ndarray) -> torch.Tensor:
        theta = self._numbers(placement)
        size = [len(theta), drawings.shape[1], SIZE, SIZE]
        return F.grid_sample(
            drawings, F.affine_grid(theta, size, align_corners=False), align_corners=False
        )

    def _shading(self, plan: "_Plan", slot: int) -> torch.Tensor:
        """(B, 1, S, S): a thing is brighter where it is nearer to the light."""
        place = (torch.arange(SIZE, device=self.device) + 0.5) * 2 / SIZE - 1
        centre = self._numbers(plan.centres[:, slot])  # (B, 2), x and y
        light = self._numbers(plan.light)
        size = self._numbers(plan.sizes[:, slot]).view(-1, 1, 1)
        across = (place.view(1, 1, -1) - centre[:, 0].view(-1, 1, 1)) * light[:, 0].view(-1, 1, 1)
        down = (place.view(1, -1, 1) - centre[:, 1].view(-1, 1, 1)) * light[:, 1].view(-1, 1, 1)
        slope = (across + down) / size
        return 1 + _SHADING * slope.clamp(-1, 1).unsqueeze(1)


class Gallery:
    """Pictures painted once and shown again and again, half of the time mirrored.

    Args:
        count: how many; 0.4 MB each at 192 pixels, on the device.
        folder: where they are kept as well, see draw_once.
    """

    def __init__(
        self,
        painter: Painter,
        count: int,
        seed: int,
        at_once: int = 256,
        folder: Path | None = None,
    ):
        self.device = painter.device

        def paint(first: int, number: int) -> Mapping[str, torch.Tensor]:
            pictures = painter.paint(number, seed + first)
            rows = {}
            for field in fields(Pictures):
                values = getattr(pictures, field.name)
                is_picture = values.ndim == 4
                rows[field.name] = (values * 255).round().to(torch.uint8) if is_picture else values
            return rows

        self.kept = draw_once(paint, count, at_once, folder)

    def paint(self, count: int, seed: int) -> Pictures:
        """Some of the pictures; the same seed shows the same."""
        rng = np.random.default_rng(seed)
        index = torch.from_numpy(rng.integers(len(self.kept["style"]), size=count))
        on_device = index.to(self.device)
        mirrored = rng.random() < 0.5
        rows = {}
        for name, values in self.kept.items():
            taken = values[on_device if values.ndim == 4 else index]
            if taken.ndim == 4:
                taken = taken.float() / 255
                taken = taken.flip(3) if mirrored else taken
            rows[name] = taken
        return Pictures(**rows)


def draw_once(
    draw: Callable[[int, int], Mapping[str, torch.Tensor]],
    count: int,
    at_once: int,
    folder: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Samples by name, drawn some at a time.

    Args:
        draw: (number of the first, how many) -> their tensors, the sample first.
        folder: keeps what is drawn, so that a stopped run goes on. It does not know how they were
            drawn: whoever changes that uses another one.
    """
    kept: dict[str, torch.Tensor] = {}
    for first in range(0, count, at_once):
        path = folder / f"{first:06}.safetensors" if folder else None
        if path and path.exists():
            rows = load_file(path)
        else:
            drawn = draw(first, min(at_once, count - first))
            rows = {name: values.contiguous() for name, values in drawn.items()}
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial:
                    save_file(rows, partial)
        for name, values in rows.items():
            if name not in kept:
                shape = (count, *values.shape[1:])
                kept[name] = torch.empty(shape, dtype=values.dtype, device=values.device)
            kept[name][first : first + len(values)] = values
    return kept


@dataclass(frozen=True)
class _Plan:
    """What stands where; lengths are shares of the picture's side, places are in [-1, 1]."""

    things: np.ndarray  # (B, K)
    style: np.ndarray  # (B,)
    sizes: np.ndarray  # (B, K), longer sides
    centres: np.ndarray  # (B, K, 2), x and y
    angles: np.ndarray  # (B, K), radians
    mirrors: np.ndarray  # (B, K), 1 or -1
    light: np.ndarray  # (B, 2), towards it
    brightness: np.ndarray  # (B,)
    order: list[int]  # of the slots, from the back to the front

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, names: int, targets: str) -> "_Plan":
        sizes = np.exp(rng.uniform(*np.log(_OTHER_SIZES), (count, MOST_THINGS)))
        sizes[:, 0] = np.exp(rng.uniform(*np.log(_TARGET_SIZES), count))
        centres = _centres(rng, sizes)
        things, style = _pairs(rng, count, names, targets)
        number_of_things = rng.choice([1, 2, 3, 4], count, p=[0.3, 0.25, 0.25, 0.2])
        is_there = np.arange(MOST_THINGS) < number_of_things[:, None]
        is_there &= ~_crowded(centres, sizes, rng)
        direction = rng.uniform(0, 2 * math.pi, count)
        in_front = rng.random() < 0.2
        return cls(
            things=np.where(is_there, things, NO_THING),
            style=style,
            sizes=sizes,
            centres=centres,
            angles=rng.normal(0, 0.25, (count, MOST_THINGS)),
            mirrors=np.where(rng.random((count, MOST_THINGS)) < 0.5, -1.0, 1.0),
            light=np.stack((np.cos(direction), np.sin(direction)), axis=1),
            brightness=rng.uniform(0.78, 1.08, count),
            order=[2, 3, 0, 1] if in_front else [1, 2, 3, 0],
        )

    def placement(self, slot: int, shift: float = 0.0) -> np.ndarray:
        """(B, 2, 3): from places in the picture to places in the slot's drawing.

        Args:
            shift: away from the light, as a share of the thing's size.
        """
        size = self.sizes[:, slot]
        centre = self.centres[:, slot] - 2 * shift * size[:, None] * self.light  # a side is 2
        cosine = np.cos(self.angles[:, slot]) / size
        sine = np.sin(self.angles[:, slot]) / size
        mirror = self.mirrors[:, slot]
        theta = np.empty((len(size), 2, 3))
        theta[:, 0, 0] = mirror * cosine
        theta[:, 0, 1] = mirror * sine
        theta[:, 1, 0] = -sine
        theta[:, 1, 1] = cosine
        theta[:, :, 2] = -np.einsum("bij,bj->bi", theta[:, :, :2], centre)
        return theta


def _centres(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """(B, K, 2): each further thing as far from the others as one of some places allows."""
    count, slots = sizes.shape
    room = 1 - 0.85 * sizes  # most of a thing is in the picture
    centres = np.empty((count, slots, 2))
    centres[:, 0] = rng.uniform(-1, 1, (count, 2)) * room[:, :1]
    everyone = np.arange(count)
    for slot in range(1, slots):
        tried = rng.uniform(-1, 1, (count, _TRIES, 2)) * room[:, slot, None, None]
        distances = np.linalg.norm(tried[:, :, None] - centres[:, None, :slot], axis=3).min(2)
        enough = np.minimum(distances, 2 * sizes[:, slot, None])  # not always to the corners
        chosen = (enough + 0.1 * rng.random(enough.shape)).argmax(1)
        centres[:, slot] = tried[everyone, chosen]
    return centres


def _crowded(centres: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(B, K) bool: a thing that would lie on an earlier one, which is allowed at times."""
    count, slots = sizes.shape
    crowded = np.zeros((count, slots), bool)
    for slot in range(1, slots):
        distances = np.linalg.norm(centres[:, :slot] - centres[:, slot, None], axis=2)
        touching = sizes[:, :slot] + sizes[:, slot, None]  # a side is 2, so this is half of each
        least = np.where(rng.random((count, 1)) < 0.2, 0.6, 0.9)
        crowded[:, slot] = (distances < least * touching).any(1)
    return crowded


def _pairs(
    rng: np.random.Generator, count: int, names: int, targets: str
) -> tuple[np.ndarray, np.ndarray]:
    """Things (B, K), no two alike in a picture, and a style a picture (B,).

    All but the target are pairs that training draws.
    """
    things = np.empty((count, MOST_THINGS), np.int64)
    style = rng.integers(len(STYLES), size=count)
    for row in range(count):
        allowed = _allowed(names, style[row])
        if targets == "trained":
            target = rng.choice(allowed)
        elif targets == "held out":
            target = rng.choice(np.setdiff1d(np.arange(names), allowed))
        else:
            target = rng.integers(names)
        others = allowed[allowed != target]
        things[row, 0] = target
        things[row, 1:] = rng.choice(others, MOST_THINGS - 1, replace=False)
    return things, style


def _allowed(names: int, style: int) -> np.ndarray:
    things = np.arange(names)
    return things[~is_held_out(things, style)]


def _over(layer: torch.Tensor, shadow: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """A premultiplied layer and its shadow over a picture (B, 3, S, S)."""
    return layer[:, :3] + (1 - layer[:, 3:]) * (1 - shadow) * below


# Holes --------------------------------------------------------------------------------------------


def box_holes(pictures: Pictures, rng: np.random.Generator) -> torch.Tensor:
    """(B, 1, S, S), 1 = repaint: the target's bounding box, a little larger."""
    inside = pictures.target[:, 0] > 0.1
    edges = []
    for axis in (1, 2):  # rows come from columns' any, and the other way round
        line = inside.any(axis)
        first = line.float().argmax(1)
        last = SIZE - 1 - line.flip(1).float().argmax(1)
        edges.append((first, last))
    (left, right), (top, bottom) = edges
    count = len(inside)
    margin = torch.from_numpy(rng.uniform(0.02, 0.14, (4, count))).to(inside.device)
    margin = margin * pictures.longer_side.to(inside.device) * SIZE
    place = torch.arange(SIZE, device=inside.device).view(1, -1)
    across = (place >= (left - margin[0])[:, None]) & (place <= (right + margin[1])[:, None])
    down = (place >= (top - margin[2])[:, None]) & (place <= (bottom + margin[3])[:, None])
    return (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1).float()


def blob_holes(pictures: Pictures, seed: int) -> torch.Tensor:
    """(B, 1, S, S), 1 = repaint: about the target, as one paints with a broad brush."""
    target = pictures.target
    covered = F.max_pool2d((target > 0.1).float(), 7, 1, 3)
    generator = torch.Generator(target.device).manual_seed(seed)
    noise = torch.randn(len(target), 1, 10, 10, device=target.device, generator=generator)
    noise = F.interpolate(noise, (SIZE, SIZE), mode="bicubic")
    near = covered
    for _ in range(2):
        near = F.avg_pool2d(near, 17, 1, 8)
    return torch.maximum(covered, (near + 0.12 * noise * (near > 0.02) > 0.2).float())


def random_holes(count: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """(B, 1, S, S), 1 = repaint: boxes and blobs anywhere, as a Stable Diffusion's training has."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(seed)
    size = np.exp(rng.uniform(np.log(0.2), np.log(0.85), (count, 2)))
    centre = rng.uniform(0, 1, (count, 2))
    low = torch.from_numpy(centre - size / 2).float().to(device) * SIZE
    high = torch.from_numpy(centre + size / 2).float().to(device) * SIZE
    place = torch.arange(SIZE, device=device).view(1, -1)
    down = (place >= low[:, :1]) & (place <= high[:, :1])
    across = (place >= low[:, 1:]) & (place <= high[:, 1:])
    boxes = (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1)
    noise = torch.randn(count, 1, 7, 7, device=device, generator=generator)
    noise = F.interpolate(noise, (SIZE, SIZE), mode="bicubic")
    ragged = torch.from_numpy(rng.random((count, 1, 1, 1)) < 0.5).to(device)
    return (boxes & (~ragged | (noise > -0.3))).float()


def within(pictures: Pictures, hole: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S): the target where the hole is, the picture without it elsewhere.

    What a shadow throws out of the hole is not seen, so that it cannot betray the target.
    """
    return hole * pictures.whole + (1 - hole) * pictures.without
