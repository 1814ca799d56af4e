"""Pictures drawn with Pillow: a run's curves, histograms of similarities, and sheets of samples."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from .. import preprocess
from .axis import Axis
from .captions import SMALL, one_line, shortened, width_of, write
from .tensors import to_picture

WIDTH = 640  # pixels of a panel
PANEL = 320  # its height, where it is alone
HALF = 226  # the height of each of two: a node shows pictures some 180 pixels high
# A node shows a panel some 260 pixels wide: its text is 11 pixels high there.
FONT = 28  # pixels
LEFT = 96  # inside of it, the frame of a curve or a histogram
RIGHT = WIDTH - 24
TOP = 44
BOTTOM = PANEL - 40
BELOW = PANEL - BOTTOM  # the line below the frame
LINE = 20  # height of a line of text on a sheet

RED = (200, 60, 40)
BLUE = (40, 90, 180)
GREY = (140, 140, 140)
PALE = (238, 200, 192)
GRID = (228, 228, 228)


@dataclass(frozen=True)
class Curve:
    """A number of every step so far."""

    name: str
    values: Sequence[float]
    colour: tuple[int, int, int]

    @property
    def finite(self) -> list[float]:
        """The values that can be drawn."""
        return [value for value in self.values if math.isfinite(value)]


def curves(history: Sequence[Mapping[str, float]], steps: int) -> Image.Image:
    """A run's figures of each step so far.

    These are the loss, and SemInpainter's cosine similarity to CLIP where it was watched.
    """
    loss = _column(history, "loss")
    panels = [[Curve("loss of each step", loss, PALE), Curve("mean", _smooth(loss), RED)]]
    if history and "cosine" in history[0]:
        observed = _smooth(_column(history, "cosine_observed"))
        predicted = _smooth(_column(history, "cosine"))
        panels.append(
            [
                Curve("cosine observed", observed, GREY),
                Curve("predicted", predicted, BLUE),
            ]
        )
    height = PANEL if len(panels) == 1 else HALF
    picture = Image.new("RGB", (WIDTH, height * len(panels)), "white")
    for i, panel in enumerate(panels):
        _draw_curves(ImageDraw.Draw(picture), i * height, height, panel, steps)
    return picture


def _column(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [figures[name] for figures in history]


def _smooth(values: list[float]) -> list[float]:
    """Mean over the last twentieth of the run, so far."""
    window = max(len(values) // 20, 1)
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for end in range(1, len(sums)):
        start = max(end - window, 0)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def _draw_curves(
    draw: ImageDraw.ImageDraw, top: int, height: int, panel: Sequence[Curve], steps: int
) -> None:
    """One panel: a legend above, three lines of the grid, and the curves."""
    values = []
    for curve in panel:
        values += curve.finite
    low = min(values, default=0.0)
    spread = (max(values, default=0.0) - low) or abs(low) or 1.0
    x = Axis(0, max(steps, 1), LEFT, RIGHT)
    bottom = top + height - BELOW
    y = Axis(low, low + spread, bottom, top + TOP)
    _legend(draw, top + 22, [(curve.name, curve.colour) for curve in panel])
    for value in (low, low + spread / 2, low + spread):
        draw.line((LEFT, y(value), RIGHT, y(value)), fill=GRID)
        _beside(draw, y(value), _number(value))
    for step in (0, steps // 2, steps):
        _centred(draw, (x(step), bottom + 6), str(step))
    for curve in panel:
        points = []
        for step, value in enumerate(curve.values, 1):
            if math.isfinite(value):
                points.append((x(step), y(value)))
        # A single point becomes a short line, and is seen.
        before = [(across - 2, down) for across, down in points[:1]]
        draw.line(before + points, fill=curve.colour, width=2)


def _legend(
    draw: ImageDraw.ImageDraw, y: float, entries: Iterable[tuple[str, tuple[int, int, int]]]
) -> None:
    """Names side by side, each behind a stroke of its colour; smaller where they are many."""
    entries = list(entries)
    size = FONT
    while size > SMALL and sum(44 + width_of(name, size) for name, _ in entries) > WIDTH - LEFT:
        size -= 1
    x = LEFT
    for name, colour in entries:
        draw.line((x, y, x + 20, y), fill=colour, width=6)
        write(draw, (x + 26, y - size / 2 - 2), name, size, fill="black")
        x += 44 + int(width_of(name, size))


def _centred(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
    """A text below a point, moved inwards where it would not fit into the panel."""
    x, y = place
    width = width_of(text, FONT)
    write(draw, (min(x - width / 2, WIDTH - 4 - width), y), text, FONT, fill="black")


def _number(value: float) -> str:
    """As many digits as fit beside the frame."""
    for digits in (3, 2):
        text = f"{value:.{digits}g}"
        if width_of(text, FONT) <= LEFT - 12:
            return text
    return f"{value:.0e}"


def _beside(draw: ImageDraw.ImageDraw, y: float, text: str) -> None:
    """A number left of the frame."""
    write(draw, (LEFT - 8 - width_of(text, FONT), y - FONT / 2 - 2), text, FONT, fill="black")


def histogram(series: Mapping[str, Sequence[float]], bins: int = 40) -> Image.Image:
    """How often each cosine similarity occurs, as the paper's Fig. 4a; dashed lines are means.

    Args:
        series: for one to three names, values in [-1, 1].
        bins: of equal width, over the tenths that hold all values, up to 1.
    """
    least = min(map(min, series.values()))
    low = math.floor(10 * least) / 10
    high = max(1.0, low + 0.1)
    shares = {}
    for name, values in series.items():
        counts, _ = np.histogram(values, bins, (low, high))
        shares[name] = counts / len(values)
    most = max(map(max, shares.values()))

    x = Axis(low, high, LEFT, RIGHT)
    bin_axis = Axis(0, bins, LEFT, RIGHT)
    # Whole pixels; what rounding in floating point takes off them is given back.
    edges = [math.floor(bin_axis(i) + 1e-9) for i in range(bins + 1)]
    y = Axis(0, most, BOTTOM, TOP)
    picture = Image.new("RGB", (WIDTH, PANEL), "white")
    draw = ImageDraw.Draw(picture, "RGBA")
    entries = []
    for (name, values), colour in zip(series.items(), (GREY, BLUE, RED), strict=False):
        for share, (left, right) in zip(shares[name], itertools.pairwise(edges), strict=True):
            draw.rectangle((left, y(share), right - 1, BOTTOM), fill=(*colour, 110))
        mean = sum(values) / len(values)
        for dash in range(TOP, BOTTOM, 8):
            draw.line((x(mean), dash, x(mean), dash + 4), fill=colour, width=2)
        entries.append((f"{name} {mean:.3f}", colour))
    _legend(draw, 22, entries)
    for value in (low, low + 0.5 * (high - low), high):
        _centred(draw, (x(value), BOTTOM + 6), f"{value:.2f}")
    for share in (0, most):
        _beside(draw, y(share), f"{share:.0%}")
    return picture


def similarity(patches: torch.Tensor, teacher: torch.Tensor) -> Image.Image:
    """Cosine similarity of each patch to the teacher's, as a grey square.

    Args:
        patches: (N, D), and so is `teacher`.
    Returns:
        Black is 0 or below, white is 1.
    """
    side = math.isqrt(len(patches))
    cosine = torch.nn.functional.cosine_similarity(patches.float(), teacher.float(), dim=1)
    picture = to_picture(cosine.reshape(side, side))
    size = (preprocess.CLIP_SIZE, preprocess.CLIP_SIZE)
    return picture.resize(size, Image.Resampling.NEAREST)


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str], side: int = 256
) -> Image.Image:
    """Rows of pictures under column titles, each row with a line of text below it."""
    size = (side * len(titles), LINE + (side + LINE) * len(rows))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        write(draw, (column * side + 4, 2), shortened(title, side - 8), fill="black")
    for row, (text, pictures) in enumerate(rows):
        top = LINE + row * (side + LINE)
        for column, picture in enumerate(pictures):
            cell = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(cell, (column * side, top))
        line = shortened(one_line(text), canvas.width - 8)
        write(draw, (4, top + side + 2), line, fill="black")
    return canvas
