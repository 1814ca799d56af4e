"""Shapes, colours and backgrounds of the demo model's scenes, rasterised in numpy.

Only +, -, *, /, square roots and comparisons are used, which IEEE arithmetic rounds the same way
everywhere, and only uniform draws: a seed gives the same picture on any machine. Positions and
sizes are fractions of the picture's side, x to the right and y down; S is that side in pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLOURS = {
    "red": (212, 32, 36),
    "orange": (246, 128, 22),
    "yellow": (250, 220, 40),
    "green": (40, 158, 62),
    "blue": (36, 84, 214),
    "purple": (128, 48, 176),
    "pink": (250, 146, 196),
    "white": (246, 246, 244),
}
RIM = 0.07  # width of the darker rim, in half sizes of the object


# Shapes -------------------------------------------------------------------------------------------
# Each maps coordinates x, y of the object's own frame to the distance from its outline, negative
# inside. Beyond a corner the distance to the nearest edge's line is enough.


def _circle(x, y, radius=1.0):
    return np.sqrt(x * x + y * y) - radius


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 1


def _triangle(x, y):
    return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.5


def _star(x, y):
    x = np.abs(x)
    y = -y
    # Mirrored at two lines through the middle, all five points lie on the one that looks up.
    for normal_x, normal_y in ((0.8090170, -0.5877853), (-0.8090170, -0.5877853)):
        outside = 2 * np.maximum(normal_x * x + normal_y * y, 0)
        x = x - outside * normal_x
        y = y - outside * normal_y
    # The edge leads from that tip to the corner between two points.
    edge_x = 0.48 * 0.5877853
    edge_y = 0.48 * 0.8090170 - 1
    length = math.sqrt(edge_x * edge_x + edge_y * edge_y)
    return (np.abs(x) * -edge_y + (y - 1) * edge_x) / length


def _heart(x, y):
    x = np.abs(x)
    lobe = _circle(x - 0.5, y + 0.45, 0.52)
    # The wedge reaches from the tip to the cleft and is tangent to the lobe.
    wedge = np.maximum(0.8149 * x + 0.5796 * y - 0.6665, 0.4335 * x - 0.9012 * (y + 0.5928))
    return np.minimum(lobe, wedge)


def _ring(x, y):
    return np.abs(_circle(x, y, 0.7)) - 0.3


def _cross(x, y):
    x = np.abs(x)
    y = np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.34)


def _crescent(x, y):
    return np.maximum(_circle(x, y), -_circle(x - 0.5, y, 0.8))


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
}
SHAPES = tuple(_DISTANCES)
_UNIT_DISC = ((0, 0, 1),)
# The discs (x, y, radius) whose convex hull encloses a shape: where it can reach when it is turned.
_HULLS = {
    "circle": _UNIT_DISC,
    "square": ((-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)),
    "triangle": ((0, -1, 0), (0.8660254, 0.5, 0), (-0.8660254, 0.5, 0)),
    "star": (
        (0.0, -1.0, 0),
        (0.9510565, -0.3090170, 0),
        (0.5877853, 0.8090170, 0),
        (-0.5877853, 0.8090170, 0),
        (-0.9510565, -0.3090170, 0),
    ),
    "heart": ((-0.5, -0.45, 0.52), (0.5, -0.45, 0.52), (0, 1.15, 0)),
    "ring": _UNIT_DISC,
    "cross": (
        (-1, -0.34, 0),
        (-1, 0.34, 0),
        (1, -0.34, 0),
        (1, 0.34, 0),
        (-0.34, -1, 0),
        (-0.34, 1, 0),
        (0.34, -1, 0),
        (0.34, 1, 0),
    ),
    "crescent": _UNIT_DISC,
}


@dataclass(frozen=True)
class Outline:
    """A rotated shape around its origin; lengths are fractions of the picture's side."""

    shape: str
    cos: float
    sin: float
    unit: float  # length of the shape's own unit
    bounds: tuple[float, float, float, float]  # x0, y0, x1, y1 relative to the origin

    @classmethod
    def draw(cls, shape: str, size: float, rng: np.random.Generator) -> "Outline":
        """The shape, turned by up to 23 degrees; its bounding box's longer side is `size`."""
        tilt = 0.4 * (rng.random() - 0.5)  # tangent of half the angle
        cos = (1 - tilt * tilt) / (1 + tilt * tilt)
        sin = 2 * tilt / (1 + tilt * tilt)
        left = top = math.inf
        right = bottom = -math.inf
        for x, y, radius in _HULLS[shape]:
            turned_x = x * cos - y * sin
            turned_y = x * sin + y * cos
            left = min(left, turned_x - radius)
            top = min(top, turned_y - radius)
            right = max(right, turned_x + radius)
            bottom = max(bottom, turned_y + radius)
        unit = size / max(right - left, bottom - top)
        return cls(shape, cos, sin, unit, (unit * left, unit * top, unit * right, unit * bottom))

    @property
    def reach(self) -> float:
        """Half the longer side of the bounding box."""
        x0, y0, x1, y1 = self.bounds
        return max(x1 - x0, y1 - y0) / 2

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """How far points are from the outline, negative inside; all in the shape's own unit."""
        own_x = x * self.cos + y * self.sin
        own_y = y * self.cos - x * self.sin
        return _DISTANCES[self.shape](own_x, own_y)


def paint(
    picture: np.ndarray, outline: Outline, x: float, y: float, colour: tuple[float, float, float]
) -> np.ndarray:
    """Paint an object with its origin at (x, y) over picture (S, S, 3) uint8, in place.

    Returns its antialiased silhouette (S, S) uint8; a pixel where that is 0 is untouched.
    """
    side = len(picture)
    x0, y0, x1, y1 = outline.bounds
    left = _pixel_border(x + x0, side, -2)
    top = _pixel_border(y + y0, side, -2)
    right = _pixel_border(x + x1, side, 3)
    bottom = _pixel_border(y + y1, side, 3)
    u = ((np.arange(left, right, dtype=np.float32) + 0.5) / side - x) / outline.unit  # (w,)
    v = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / side - y)[:, None] / outline.unit
    pixel = 1 / (side * outline.unit)
    distance = outline.distance(u, v)  # (h, w)
    alpha = (np.clip(0.5 - distance / pixel, 0, 1) * 255 + 0.5).astype(np.uint8)
    rim = np.clip((distance + RIM) / pixel + 0.5, 0, 1)
    light = (1 - 0.22 * rim) * (0.95 - 0.11 * (u + v))  # lit from the top left
    painted = np.clip(light[..., None] * np.array(colour, np.float32), 0, 255)
    opacity = alpha[..., None].astype(np.float32) / 255
    patch = picture[top:bottom, left:right]
    patch[:] = patch + (painted - patch) * opacity + 0.5
    silhouette = np.zeros((side, side), np.uint8)
    silhouette[top:bottom, left:right] = alpha
    return silhouette


def _pixel_border(position: float, side: int, beyond: int) -> int:
    """The pixel border at a position, moved `beyond` pixels on, inside a picture of `side`."""
    return min(max(math.floor(position * side + beyond), 0), side)


# Backgrounds --------------------------------------------------------------------------------------
# Each returns (S, S) float32 in [0, 1]: where between the background's two colours a pixel lies.


def background(family: str, rng: np.random.Generator, side: int) -> np.ndarray:
    """A textured background of muted colours: (S, S, 3) uint8."""
    texture = _BACKGROUNDS[family](rng, side)
    blend = texture + (rng.random((side, side), dtype=np.float32) - 0.5) * 0.16
    grey = 90 + 62 * rng.random()
    contrast = 24 + 22 * rng.random()
    if rng.random() < 0.5:
        contrast = -contrast
    first = (grey - contrast / 2 + 30 * (rng.random(3) - 0.5)).astype(np.float32)
    change = (contrast + 16 * (rng.random(3) - 0.5)).astype(np.float32)
    return (first + blend[..., None] * change + 0.5).astype(np.uint8)


def _smooth(rng, side):
    x, y = _grid(side)
    cos, sin = _direction(rng)
    return np.clip(0.5 + 0.9 * ((x - 0.5) * cos + (y - 0.5) * sin), 0, 1)


def _cloudy(rng, side):
    cells = 2 + int(3 * rng.random())
    coarse = 0.5 * _noise(rng, side, cells)
    middle = 0.3 * _noise(rng, side, 2 * cells)
    fine = 0.2 * _noise(rng, side, 5 * cells)
    return np.clip(2 * (coarse + middle + fine) - 0.5, 0, 1)


def _striped(rng, side):
    x, y = _grid(side)
    cos, sin = _direction(rng)
    return _bands(x * cos + y * sin, 4 + 5 * rng.random(), side)


def _checked(rng, side):
    x, y = _grid(side)
    cos, sin = _direction(rng)
    cells = 2 + 2.5 * rng.random()
    one = _bands(x * cos + y * sin, cells, side)
    other = _bands(y * cos - x * sin, cells, side)
    return one + other - 2 * one * other


def _wooden(rng, side):
    x, y = _grid(side)
    cos, sin = _direction(rng)
    along = x * cos + y * sin - 2 * rng.random()
    across = y * cos - x * sin - rng.random()
    across = across + 0.16 * _noise(rng, side, 3)
    rings = np.sqrt(along * along * 0.03 + across * across) * (7 + 4 * rng.random())
    return 0.75 * (rings - np.floor(rings)) + 0.25 * _noise(rng, side, 14)


_BACKGROUNDS = {
    "smooth": _smooth,
    "cloudy": _cloudy,
    "striped": _striped,
    "checked": _checked,
    "wooden": _wooden,
}
BACKGROUNDS = tuple(_BACKGROUNDS)


def _bands(x: np.ndarray, count: float, side: int) -> np.ndarray:
    """Alternating 0 and 1, `count` pairs over a length of 1, with edges about a pixel wide."""
    phase = x * count
    wave = np.abs(phase - np.floor(phase) - 0.5) - 0.25
    return np.clip(wave * (side / count) + 0.5, 0, 1)


def _noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth random values, one corner value for each of `cells` cells a side."""
    corners = rng.random((cells + 1, cells + 1), dtype=np.float32)
    cell, weight = _interpolation(side, cells)
    rows = corners[cell] + (corners[cell + 1] - corners[cell]) * weight[:, None]  # (S, cells + 1)
    return rows[:, cell] + (rows[:, cell + 1] - rows[:, cell]) * weight


@lru_cache(maxsize=64)
def _interpolation(side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each pixel (S,) int64, and its eased position in there (S,) float32 in [0, 1]."""
    position = (np.arange(side, dtype=np.float32) + 0.5) / side * cells
    cell = np.floor(position)
    inside = position - cell
    eased = inside * inside * (3 - 2 * inside)
    return cell.astype(np.int64), eased


@lru_cache(maxsize=4)
def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres: x (S,), y (S, 1) float32 in [0, 1]."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    return centres, centres[:, None]


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    """Cosine and sine of a uniform random angle, without trigonometry."""
    while True:
        x = 2 * rng.random() - 1
        y = 2 * rng.random() - 1
        square = x * x + y * y
        if 0.01 < square <= 1:
            return x / math.sqrt(square), y / math.sqrt(square)
