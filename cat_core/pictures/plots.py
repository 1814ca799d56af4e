"""Pictures drawn with Pillow: a run's curves, histograms of similarities, and sheets of samples."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from .. import preprocess

WIDTH, PANEL, MARGIN = 640, 240, 44  # pixels
RED, BLUE, GREY, PALE = (200, 60, 40), (40, 90, 180), (140, 140, 140), (238, 200, 192)


def curves(history: Sequence[Mapping[str, float]], steps: int) -> Image.Image:
    """A run's figures of each step so far: the loss, and SemInpainter's cosine similarity to CLIP where it was watched."""
    loss = [figures["loss"] for figures in history]
    panels = [{"loss of each step": (loss, PALE), "mean": (_smooth(loss), RED)}]
    if history and "cosine" in history[0]:
        panels.append(
            {
                "cosine in the hole, observed": (
                    _smooth([f["cosine_observed"] for f in history]),
                    GREY,
                ),
                "predicted": (_smooth([f["cosine"] for f in history]), BLUE),
            }
        )
    picture = Image.new("RGB", (WIDTH, PANEL * len(panels)), "white")
    for i, panel in enumerate(panels):
        _panel(ImageDraw.Draw(picture), i * PANEL, panel, steps)
    return picture


def _smooth(values: list[float]) -> list[float]:
    """Mean over the last twentieth of the run, so far."""
    window = max(len(values) // 20, 1)
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i] - sums[max(i - window, 0)]) / min(window, i) for i in range(1, len(sums))]


def _panel(
    draw: ImageDraw.ImageDraw, top: int, lines: Mapping[str, tuple[list[float], tuple]], steps: int
) -> None:
    left, right, top, bottom = MARGIN + 12, WIDTH - 12, top + 28, top + PANEL - 24
    values = [value for line, _ in lines.values() for value in line if math.isfinite(value)] or [
        0.0
    ]
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    x = left
    for name, (_, colour) in lines.items():
        draw.line((x, top - 14, x + 14, top - 14), fill=colour, width=3)
        draw.text((x + 18, top - 20), name, fill="black")
        x += 34 + int(draw.textlength(name))
    for value in (low, low + spread / 2, low + spread):
        y = bottom - (value - low) / spread * (bottom - top)
        draw.line((left, y, right, y), fill=(228, 228, 228))
        draw.text((4, y - 6), f"{value:.3g}", fill="black")
    for step in (0, steps // 2, steps):
        x = left + step / max(steps, 1) * (right - left)
        draw.text((x - draw.textlength(str(step)) / 2, bottom + 6), str(step), fill="black")
    for line, colour in lines.values():
        points = [
            (
                left + (i + 1) / max(steps, 1) * (right - left),
                bottom - (value - low) / spread * (bottom - top),
            )
            for i, value in enumerate(line)
            if math.isfinite(value)
        ]
        draw.line(
            [(x - 2, y) for x, y in points[:1]] + points, fill=colour, width=2
        )  # a dot where there is one point


def histogram(series: Mapping[str, Sequence[float]], bins: int = 40) -> Image.Image:
    """How often each cosine similarity occurs, as the paper's Fig. 4a; dashed lines are means.

    Args:
        series: for one to three names, values in [-1, 1].
        bins: of equal width, over the tenths that hold all values, up to 1.
    """
    low = math.floor(10 * min(min(values) for values in series.values())) / 10
    high = max(1.0, low + 0.1)
    left, right, top, bottom = MARGIN + 12, WIDTH - 12, 28, PANEL - 24
    picture = Image.new("RGB", (WIDTH, PANEL), "white")
    draw = ImageDraw.Draw(picture, "RGBA")
    shares = {
        name: np.histogram(values, bins, (low, high))[0] / len(values)
        for name, values in series.items()
    }
    most, x = max(share.max() for share in shares.values()), left
    for (name, share), colour in zip(shares.items(), (GREY, BLUE, RED)):
        for i, value in enumerate(share):
            first, after = (left + (right - left) * place // bins for place in (i, i + 1))
            draw.rectangle(
                (first, bottom - value / most * (bottom - top), after - 1, bottom),
                fill=(*colour, 110),
            )
        mean = sum(series[name]) / len(series[name])
        across = left + (mean - low) / (high - low) * (right - left)
        for y in range(top, bottom, 8):
            draw.line((across, y, across, y + 4), fill=colour, width=2)
        text = f"{name}, mean {mean:.3f}"
        draw.line((x, 14, x + 14, 14), fill=colour, width=3)
        draw.text((x + 18, 8), text, fill="black")
        x += 34 + int(draw.textlength(text))
    for place in (0, 0.5, 1):
        text = f"{low + place * (high - low):.2f}"
        draw.text(
            (left + place * (right - left) - draw.textlength(text) / 2, bottom + 6),
            text,
            fill="black",
        )
    for share in (0, most):
        draw.text((4, bottom - share / most * (bottom - top) - 6), f"{share:.1%}", fill="black")
    return picture


def similarity(patches: torch.Tensor, teacher: torch.Tensor) -> Image.Image:
    """Cosine similarity of each patch to the teacher's, (N, D) x 2 -> a grey square: black 0 or below, white 1."""
    side = math.isqrt(len(patches))
    cosine = torch.nn.functional.cosine_similarity(patches.float(), teacher.float(), dim=1).reshape(
        side, side
    )
    grey = cosine.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(grey).resize((preprocess.CLIP_SIZE,) * 2, Image.Resampling.NEAREST)


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str], side: int = 256
) -> Image.Image:
    """Rows of pictures under column titles, each row with a line of text below it."""
    picture = Image.new("RGB", (side * len(titles), 20 + (side + 20) * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((column * side + 4, 4), title, fill="black")
    for row, (text, pictures) in enumerate(rows):
        top = 20 + row * (side + 20)
        for column, found in enumerate(pictures):
            picture.paste(
                found.convert("RGB").resize((side, side), Image.Resampling.BICUBIC),
                (column * side, top),
            )
        draw.text(
            (4, top + side + 4), text.encode("latin-1", "replace").decode("latin-1"), fill="black"
        )
    return picture
