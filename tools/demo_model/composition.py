"""Which objects a drawn scene has, where they lie, and how its caption tells it.

The order in which `rng` is asked decides what every seed shows. Positions are fractions of the
picture's side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demo_model.drawing import COLOURS, Outline, paint

Pair = tuple[str, str]  # shape and colour
_LEAST_SIZE = 0.28  # longer side of an object's bounding box
_MOST_SIZE = 0.48


@dataclass(frozen=True)
class PlacedObject:
    """A coloured shape with its origin at (x, y)."""

    shape: str
    colour: str
    outline: Outline
    x: float
    y: float

    def paint_over(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Paint it over `image`, in place; returns its silhouette (S, S) uint8."""
        tint = tuple(value + 16 * (rng.random() - 0.5) for value in COLOURS[self.colour])
        return paint(image, self.outline, self.x, self.y, tint)


def choose(items: Sequence, rng: np.random.Generator):
    return items[int(rng.random() * len(items))]


def compose(
    targets: Sequence[Pair], others: Sequence[Pair], rng: np.random.Generator
) -> list[PlacedObject]:
    """2 to 4 objects of these shapes and colours, all different, the target first."""
    placed: list[PlacedObject] = []
    for shape, colour in _pairs(targets, others, rng):
        size = _LEAST_SIZE + (_MOST_SIZE - _LEAST_SIZE) * rng.random()
        outline = Outline.draw(shape, size, rng)
        x, y = _place(outline, placed, rng)
        placed.append(PlacedObject(shape, colour, outline, x, y))
    return placed


def _pairs(targets: Sequence[Pair], others: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    """Shape and colour of 2 to 4 objects, all different, the target first."""
    pairs = [choose(targets, rng)]
    count = 2 + int(3 * rng.random())
    while len(pairs) < count:
        pairs.append(choose([pair for pair in others if pair not in pairs], rng))
    return pairs


def _place(
    outline: Outline, placed: Sequence[PlacedObject], rng: np.random.Generator
) -> tuple[float, float]:
    """Where the outline's origin goes: the best of twelve places that chance names.

    The target goes well inside the picture, others so that most of each shows.
    """
    x0, y0, x1, y1 = outline.bounds
    margin = -0.08 if placed else 0.03
    most_room = -1.0
    position = None
    for _ in range(12):
        x = margin - x0 + (1 - 2 * margin - x1 + x0) * rng.random()
        y = margin - y0 + (1 - 2 * margin - y1 + y0) * rng.random()
        room = min((_room(outline, x, y, other) for other in placed), default=1.0)
        if room > most_room:
            most_room = room
            position = (x, y)
        if most_room > 0.8:  # circles would overlap by a fifth at most
            break
    return position


def _room(outline: Outline, x: float, y: float, other: PlacedObject) -> float:
    """The distance to another object, where two circles around them would touch at 1."""
    across = x - other.x
    along = y - other.y
    return math.sqrt(across * across + along * along) / (outline.reach + other.outline.reach)


def caption(target: PlacedObject, others: Sequence[PlacedObject], family: str) -> str:
    """Such as "a red star above a blue ring and left of a pink heart on a striped background"."""
    relations = []
    for other in others:
        name = f"{_with_article(other.colour)} {other.shape}"
        relations.append(f"{_side(target, other)} {name}")
    described = relations.pop()
    if relations:
        described = f"{', '.join(relations)} and {described}"
    name = f"{_with_article(target.colour)} {target.shape}"
    return f"{name} {described} on a {family} background"


def _side(target: PlacedObject, other: PlacedObject) -> str:
    """On which side of the other object the target is."""
    across = other.x - target.x
    along = other.y - target.y
    if abs(across) > abs(along):
        return "left of" if across > 0 else "right of"
    return "above" if along > 0 else "below"


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
