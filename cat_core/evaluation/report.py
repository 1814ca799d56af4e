"""What was measured, as one HTML file with tables, pictures and curves in it.

How that file looks stands in report.html.
"""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..pictures.axis import Axis
from .breakdown import Part
from .estimates import METRICS, RANKING, Line
from .measure import Measured
from .results import Sample
from .tables import described, groups, template

SHOWN = 4  # samples a section
SIDE = 448  # pixels of a picture in the file, at most; twice what is shown
# The first ones as in pictures/plots.py.
_COLOURS = ("#8c8c8c", "#2a5ab4", "#c83c28", "#2e8b57", "#a05fb4", "#c88a1e")


@dataclass(frozen=True)
class ChartLine:
    """A histogram as a line of steps."""

    name: str
    colour: str
    points: str  # x,y in pixels, as SVG wants them


@dataclass(frozen=True)
class Chart:
    """Histograms over common bins, for an SVG picture; marks are a pixel and a text."""

    WIDTH: ClassVar[int] = 560
    HEIGHT: ClassVar[int] = 220
    LEFT: ClassVar[int] = 48  # the frame of the lines
    RIGHT: ClassVar[int] = 540
    TOP: ClassVar[int] = 10
    BOTTOM: ClassVar[int] = 196

    title: str
    value_marks: list[tuple[float, str]]
    share_marks: list[tuple[float, str]]
    lines: list[ChartLine]


@dataclass(frozen=True)
class ShownSample:
    """A sample's pictures side by side, each a caption and a data URI."""

    label: str | None
    id: str
    figures: list[tuple[str, str]]


@dataclass(frozen=True)
class ReportSection:
    """Samples under a heading."""

    title: str
    samples: list[ShownSample]


def page(
    measured: Measured,
    lines: Sequence[Line],
    notes: Sequence[str],
    facts: Mapping[str, object],
    histogram: Mapping[str, Any] | None,
    seed: int,
    breakdowns: Mapping[str, Sequence[Part]] | None = None,
) -> str:
    """The whole report, nothing outside of it needed.

    Args:
        facts: what was compared, for the top of the page.
        histogram: edges and counts, see `chart`, of the feature cosines.
        seed: of the choice of random pictures.
        breakdowns: by heading, see breakdown.py.
    """
    first = measured.folders[0]
    metric = next(metric for metric in RANKING if metric in first.values)
    values = {}
    for title, folder in zip(measured.names, measured.folders, strict=True):
        values[title] = folder.values[metric]

    charts = []
    if histogram:
        title = "Cosine of the patches in the hole to the true picture's"
        charts.append(chart(title, **histogram))
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), 30)
    counts = {name: np.histogram(numbers, edges)[0] for name, numbers in values.items()}
    charts.append(chart(f"{METRICS[metric].title}, by picture", edges, counts))

    sections = []
    for title, places in _choices(values, metric, seed):
        shown = [_shown(measured, place, metric) for place in places]
        sections.append(ReportSection(title, shown))
    return template("report.html").render(
        facts=facts,
        groups=groups(lines),
        notes=notes,
        breakdowns=described(breakdowns or {}, measured.names),
        charts=charts,
        sections=sections,
    )


def chart(title: str, edges: npt.ArrayLike, counts: Mapping[str, npt.ArrayLike]) -> Chart:
    """Histograms as lines: each the share of its values in each bin, where any has one.

    Args:
        edges: of the bins, one more than counts.
        counts: by the histogram's name.
    """
    numbers = np.array(list(counts.values()), float)  # (histograms, bins)
    used = np.flatnonzero(numbers.sum(axis=0))
    first, last = (used[0], used[-1]) if len(used) else (0, numbers.shape[1] - 1)
    edges = np.asarray(edges, float)[first : last + 2]
    totals = numbers.sum(axis=1, keepdims=True).clip(min=1)
    shares = numbers[:, first : last + 1] / totals
    x = Axis(edges[0], edges[-1], Chart.LEFT, Chart.RIGHT)
    y = Axis(0, shares.max() or 1.0, Chart.BOTTOM, Chart.TOP)
    lines = []
    for name, share, colour in zip(counts, shares, itertools.cycle(_COLOURS), strict=False):
        points = []
        for (left, right), value in zip(itertools.pairwise(edges), share, strict=True):
            points.append(f"{x(left):.1f},{y(value):.1f} {x(right):.1f},{y(value):.1f}")
        lines.append(ChartLine(name, colour, " ".join(points)))
    return Chart(
        title,
        value_marks=[(x(value), f"{value:.6g}") for value in x.round_values()],
        share_marks=[(y(share), f"{100 * share:.3g} %") for share in y.round_values()],
        lines=lines,
    )


def _choices(
    values: Mapping[str, Sequence[float]], metric: str, seed: int
) -> Iterable[tuple[str, np.ndarray]]:
    """Titles of the sections and the places of the records in them."""
    title = METRICS[metric].title
    sign = -1 if METRICS[metric].better == "higher" else 1
    first, *others = values
    numbers = sign * np.array(values[first])
    yield f"Best of {first} by {title}", _least(numbers)
    yield f"Worst of {first} by {title}", _least(-numbers)
    rng = np.random.default_rng(seed)
    count = len(numbers)
    yield "Random", np.sort(rng.choice(count, min(SHOWN, count), replace=False))
    if len(others) == 1:
        second = others[0]
        gap = sign * np.array(values[second]) - numbers
        yield f"{second} ahead of {first} by most, {title}", _least(gap)
        yield f"{second} behind {first} by most, {title}", _least(-gap)


def _least(numbers: np.ndarray) -> np.ndarray:
    return np.argsort(numbers, kind="stable")[:SHOWN]


def _shown(measured: Measured, place: int, metric: str) -> ShownSample:
    """A sample with the original, the hole and what each folder made of it."""
    sample = measured.samples.sample(measured.samples.records[place])
    figures = [("original", data_uri(sample.picture)), ("hole", data_uri(hidden(sample)))]
    for name, folder in zip(measured.names, measured.folders, strict=True):
        made = folder.results.picture(sample.record.id, measured.samples.size)
        figures.append((f"{name}: {folder.values[metric][place]:.4g}", data_uri(made)))
    return ShownSample(sample.record.label, sample.record.id, figures)


def hidden(sample: Sample) -> Image.Image:
    """The picture with its hole filled grey, as CLIP sees it."""
    grey = Image.new("RGB", sample.picture.size, (127, 127, 127))
    return Image.composite(grey, sample.picture, sample.hole)


def data_uri(picture: Image.Image) -> str:
    """A data URI; small enough that a report of a hundred pictures opens at once."""
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
