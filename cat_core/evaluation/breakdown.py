"""Means by the object's name and by the size of its hole, for the report."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .estimates import METRICS, Line, mean_line
from .measure import Measured

LEAST = 5  # pictures of a part that is shown
MOST_LABELS = 20
SIZES = (0.05, 0.15, 0.3)  # shares of the picture that divide small holes from large ones


@dataclass(frozen=True)
class Part:
    """Some of the records: of one name, or of one size of hole."""

    title: str
    lines: list[Line]

    @property
    def count(self) -> int:
        """Its records."""
        return self.lines[0].images


def by_label(measured: Measured, resamples: int, seed: int) -> list[Part]:
    """A part for each of the most frequent names that has pictures enough."""
    labels = np.array([record.label or "" for record in measured.samples.records])
    parts = []
    for label, count in Counter(labels.tolist()).most_common(MOST_LABELS):
        if count >= LEAST:
            parts.append(_part(label, labels == label, measured, resamples, seed))
    return parts


def by_hole_size(measured: Measured, resamples: int, seed: int) -> list[Part]:
    """A part for each range of sizes that has pictures enough."""
    shares = np.array(measured.hole_shares)
    edges = (0.0, *SIZES, np.inf)
    parts = []
    for low, high in itertools.pairwise(edges):
        chosen = (shares >= low) & (shares < high)
        if chosen.sum() >= LEAST:
            until = "more" if high == np.inf else f"{100 * high:g} %"
            title = f"{100 * low:g} % to {until} of the picture"
            parts.append(_part(title, chosen, measured, resamples, seed))
    return parts


def _part(title: str, chosen: np.ndarray, measured: Measured, resamples: int, seed: int) -> Part:
    lines = []
    for metric in METRICS:
        lines += _lines(metric, chosen, measured, resamples, seed)
    return Part(title, lines)


def _lines(
    metric: str, chosen: np.ndarray, measured: Measured, resamples: int, seed: int
) -> list[Line]:
    """Of one metric, if it is measured picture by picture."""
    lines = []
    first: list[float] | None = None
    for name, folder in zip(measured.names, measured.folders, strict=True):
        if metric in folder.values:
            values = np.array(folder.values[metric])[chosen].tolist()
            lines.append(mean_line(metric, name, values, resamples, seed, first))
            first = values if first is None else first
    return lines
