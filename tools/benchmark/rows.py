"""Lines of the table that tools/bench.py prints."""

import dataclasses
import statistics
from dataclasses import dataclass

MARKS = "<!-- tools/bench.py writes from here -->", "<!-- to here -->"
HEAD = ("| | median | middle half | over its reference | |", "|---|---|---|---|---|")


@dataclass
class Row:
    """A line of the table.

    Measured values, and their ratios to the reference's value of the same round.
    """

    what: str
    unit: str
    values: list[float]
    ratios: list[float] = dataclasses.field(default_factory=list)
    note: str = ""

    def cells(self) -> list[str]:
        """What it is, median and unit, middle half, ratio and its middle half, note."""
        median = statistics.median(self.values)
        digits = 1 if median >= 100 else 3
        ratio = ""
        if self.ratios:
            ratio = f"x {statistics.median(self.ratios):.3f} {_spread(self.ratios, 3)}".rstrip()
        return [
            self.what,
            f"{median:.{digits}f} {self.unit}",
            _spread(self.values, digits),
            ratio,
            self.note,
        ]

    def __str__(self):
        what, value, spread, ratio, note = self.cells()
        return f"  {what:<64} {value:>18} {spread:<19} {ratio:<25} {note}".rstrip()


def rows_in_turn(seconds: dict[str, list[float]], reference: str | None = None) -> list[Row]:
    """Rows of forms that were timed in turn, with ratios to the reference of the same round."""
    rows = []
    for what, values in seconds.items():
        row = Row(what, "s", values)
        if reference not in (None, what):
            for value, its_reference in zip(values, seconds[reference], strict=True):
                row.ratios.append(value / its_reference)
        rows.append(row)
    return rows


def page(text: str, machine: dict[str, str], sections: dict[str, list[Row]]) -> str:
    """A Markdown page with the tables of a run in place of those between its marks.

    Raises ValueError if it has no marks.
    """
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected the lines {begin} and {end}, once each")
    lines = [begin, ""]
    for key, value in machine.items():
        lines.append(f"- {key}: {value}")
    for name, rows in sections.items():
        lines += ["", f"**{name}**", "", *HEAD]
        for row in rows:
            lines.append("| " + " | ".join(row.cells()) + " |")
    before = text[: text.index(begin)]
    after = text[text.index(end) :]
    return before + "\n".join(lines) + "\n\n" + after


def _spread(values: list[float], digits: int) -> str:
    """The middle half of the values."""
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"[{low:.{digits}f} {high:.{digits}f}]"
