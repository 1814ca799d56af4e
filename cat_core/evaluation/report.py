"""What was measured, as text, as rows and as one HTML file with pictures and curves in it.

How that file looks stands in report.html.
"""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..pictures.axis import Axis
from .breakdown import Part
from .estimates import METRICS, RANKING, Estimate, Line
from .measure import Measured
from .results import Sample

SHOWN = 4  # samples a section
SIDE = 448  # pixels of a picture in the file, at most; twice what is shown
COLUMNS = (
    "metric",
    "name",
    "images",
    "value",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
)
# LaTeX has a meaning for braces.
TEX_MARKS: dict[str, Any] = {
    "block_start_string": "((*",
    "block_end_string": "*))",
    "variable_start_string": "(((",
    "variable_end_string": ")))",
    "comment_start_string": "((=",
    "comment_end_string": "=))",
}
# The first ones as in pictures/plots.py.
_COLOURS = ("#8c8c8c", "#2a5ab4", "#c83c28", "#2e8b57", "#a05fb4", "#c88a1e")


# Text and rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableLine:
    """A line in words, as the text and the page show it."""

    name: str
    value: str
    difference: str
    verdict: str


@dataclass(frozen=True)
class LineGroup:
    """Neighbouring lines of one metric."""

    title: str
    better: str
    rows: list[TableLine]


def rows(lines: Sequence[Line]) -> list[tuple]:
    """The lines' numbers in the order of COLUMNS, None where there is none."""
    numbers = []
    for line in lines:
        estimates = (*_numbers(line.estimate), *_numbers(line.difference))
        numbers.append((line.metric, line.name, line.images, *estimates))
    return numbers


def table(lines: Sequence[Line]) -> str:
    """The lines as text in columns, intervals in brackets."""
    cells = [("", "", "value", "difference to the first", "")]
    for group in groups(lines):
        title = group.title
        for row in group.rows:
            cells.append((title, row.name, row.value, row.difference, row.verdict))
            title = ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = []
    for row in cells:
        padded = map(str.ljust, row, widths)
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)


def verdict(line: Line) -> str:
    """better or worse than the first folder, or nothing where that is not sure.

    It is sure where the interval of the difference leaves out zero.
    """
    gap = line.difference
    better = METRICS[line.metric].better
    if gap is None or gap.low is None or gap.high is None or better == "neither":
        return ""
    if gap.low <= 0 <= gap.high:
        return ""
    is_higher = gap.value > 0
    return "better" if is_higher == (better == "higher") else "worse"


def groups(lines: Sequence[Line]) -> list[LineGroup]:
    """The lines in words, neighbours of one metric together."""
    found = []
    for key, members in itertools.groupby(lines, attrgetter("metric")):
        metric = METRICS[key]
        title = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
        found.append(LineGroup(title, metric.better, [_row(line) for line in members]))
    return found


def _row(line: Line) -> TableLine:
    return TableLine(line.name, _text(line.estimate), _text(line.difference, "+"), verdict(line))


def _numbers(estimate: Estimate | None) -> tuple:
    if estimate is None:
        return None, None, None
    return estimate.value, estimate.low, estimate.high


def _text(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    value = f"{estimate.value:{sign}.4g}"
    if estimate.low is None:
        return value
    return f"{value} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


# Methods as columns -------------------------------------------------------------------------------

ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}
TEX = {
    "\\": r"\textbackslash{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "é": r"\'e",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass(frozen=True)
class ColumnRow:
    """One metric: a cell for each folder."""

    title: str
    cells: list[str]


@dataclass(frozen=True)
class Columns:
    """A table with the folders as columns."""

    names: list[str]
    rows: list[ColumnRow]


def columns(lines: Sequence[Line], names: Sequence[str]) -> Columns:
    """The lines by metric, one cell for each folder; what names no folder is left out."""
    found = []
    for key, members in itertools.groupby(lines, attrgetter("metric")):
        by_name = {line.name: line for line in members}
        if not by_name.keys() & set(names):
            continue
        metric = METRICS[key]
        cells = [_cell(by_name.get(name)) for name in names]
        unit = f", {metric.unit}" if metric.unit else ""
        found.append(ColumnRow(f"{metric.title}{unit}{ARROWS[metric.better]}", cells))
    return Columns(list(names), found)


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    gap = _text(line.difference, "+")
    return f"{_text(line.estimate)}; {gap}" if gap else _text(line.estimate)


def markdown(
    lines: Sequence[Line],
    names: Sequence[str],
    facts: Mapping[str, object],
    notes: Sequence[str],
    breakdowns: Mapping[str, Sequence[Part]],
) -> str:
    """The tables in Markdown, with folders as columns.

    Args:
        breakdowns: by heading, see breakdown.py.
    """
    text = template("tables.md").render(
        columns=columns(lines, names),
        facts=facts,
        notes=notes,
        breakdowns=_described(breakdowns, names),
    )
    return "\n".join(map(str.rstrip, text.splitlines())) + "\n"


def _described(
    breakdowns: Mapping[str, Sequence[Part]], names: Sequence[str]
) -> list[tuple[str, list[tuple[str, int, Columns]]]]:
    """For a template: headings, and for each part its title, its pictures and its table."""
    described = []
    for heading, parts in breakdowns.items():
        tables = [(part.title, part.count, columns(part.lines, names)) for part in parts]
        described.append((heading, tables))
    return described


def latex(
    lines: Sequence[Line], names: Sequence[str], breakdowns: Mapping[str, Sequence[Part]]
) -> str:
    """The same tables for LaTeX with booktabs."""
    tables = [("All pictures", columns(lines, names))]
    for heading, parts in breakdowns.items():
        for part in parts:
            title = f"{heading}: {part.title} ({part.count})"
            tables.append((title, columns(part.lines, names)))
    return template("tables.tex").render(tables=tables)


def _tex(text: str) -> str:
    """A text as LaTeX shows it."""
    return "".join(TEX.get(letter, letter) for letter in text)


# HTML ---------------------------------------------------------------------------------------------


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
        breakdowns=_described(breakdowns or {}, measured.names),
        charts=charts,
        sections=sections,
    )


def template(name: str) -> jinja2.Template:
    """A template of this folder; `number` writes an estimate with its interval."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **(TEX_MARKS if name.endswith(".tex") else {}),
    )
    environment.filters["tex"] = _tex
    environment.filters["number"] = _text
    return environment.get_template(name)


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
