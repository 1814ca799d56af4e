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
from .captions import one_line, shortened
from .tensors import to_picture

WIDTH = 640  # pixels of a panel
PANEL = 240  # its height
LEFT = 56  # inside of it, the frame of a curve or a histogram
RIGHT = WIDTH - 12
TOP = 28
BOTTOM = PANEL - 24
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
                Curve("cosine in the hole, observed", observed, GREY),
                Curve("predicted", predicted, BLUE),
            ]
        )
    picture = Image.new("RGB", (WIDTH, PANEL * len(panels)), "white")
    for i, panel in enumerate(panels):
        _draw_curves(ImageDraw.Draw(picture), i * PANEL, panel, steps)
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


def _draw_curves(draw: ImageDraw.ImageDraw, top: int, panel: Sequence[Curve], steps: int) -> None:
    """One panel: a legend above, three lines of the grid, and the curves."""
    values = []
    for curve in panel:
        values += curve.finite
    low = min(values, default=0.0)
    spread = (max(values, default=0.0) - low) or abs(low) or 1.0
    x = Axis(0, max(steps, 1), LEFT, RIGHT)
    y = Axis(low, low + spread, top + BOTTOM, top + TOP)
    _legend(draw, top + 14, [(curve.name, curve.colour) for curve in panel])
    for value in (low, low + spread / 2, low + spread):
        draw.line((LEFT, y(value), RIGHT, y(value)), fill=GRID)
        draw.text((4, y(value) - 6), f"{value:.3g}", fill="black")
    for step in (0, steps // 2, steps):
        _centred(draw, (x(step), top + BOTTOM + 6), str(step))
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
    """Names side by side, each behind a stroke of its colour."""
    x = LEFT
    for name, colour in entries:
        draw.line((x, y, x + 14, y), fill=colour, width=3)
        draw.text((x + 18, y - 6), name, fill="black")
        x += 34 + int(draw.textlength(name))


def _centred(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
    """A text below a point."""
    x, y = place
    draw.text((x - draw.textlength(text) / 2, y), text, fill="black")


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
        entries.append((f"{name}, mean {mean:.3f}", colour))
    _legend(draw, 14, entries)
    for value in (low, low + 0.5 * (high - low), high):
        _centred(draw, (x(value), BOTTOM + 6), f"{value:.2f}")
    for share in (0, most):
        draw.text((4, y(share) - 6), f"{share:.1%}", fill="black")
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
        draw.text((column * side + 4, 4), shortened(title, side - 8), fill="black")
    for row, (text, pictures) in enumerate(rows):
        top = LINE + row * (side + LINE)
        for column, picture in enumerate(pictures):
            cell = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(cell, (column * side, top))
        line = shortened(one_line(text), canvas.width - 8)
        draw.text((4, top + side + 4), line, fill="black")
    return canvas
