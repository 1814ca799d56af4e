"""What was measured, as text, as rows, and as tables in Markdown and LaTeX."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import jinja2

from .breakdown import Part
from .estimates import METRICS, Estimate, Line

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
        breakdowns=described(breakdowns, names),
    )
    return "\n".join(map(str.rstrip, text.splitlines())) + "\n"


def described(
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
