"""Lines of the table that tools/bench.py prints."""

import dataclasses
import statistics
from dataclasses import dataclass


@dataclass
class Row:
    """A line of the table: measured values, and their ratios to the reference's value of the same round."""

    what: str
    unit: str
    values: list[float]
    ratios: list[float] = dataclasses.field(default_factory=list)
    note: str = ""

    def __str__(self):
        digits = 1 if statistics.median(self.values) >= 100 else 3
        text = f"  {self.what:<64}{statistics.median(self.values):>10.{digits}f} {self.unit:<9}"
        text += _spread(self.values, f".{digits}f") if len(self.values) > 1 else ""
        if self.ratios:
            text += f"   x {statistics.median(self.ratios):.3f} {_spread(self.ratios, '.3f')}"
        return f"{text}{'   ' + self.note if self.note else ''}".rstrip()


def rows_in_turn(seconds: dict[str, list[float]], reference: str | None = None) -> list[Row]:
    """Rows of forms that were timed in turn, with ratios to the reference of the same round."""
    return [Row(what, "s", values, [a / b for a, b in zip(values, seconds[reference])] if reference not in (None, what) else [])
            for what, values in seconds.items()]


def _spread(values, form: str) -> str:
    """The middle half of the values."""
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"[{low:{form}} {high:{form}}]"
