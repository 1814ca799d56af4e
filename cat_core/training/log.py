"""What a run says of itself: CSV files, and a line on the terminal."""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path

from ..files import replacing
from .checkpoints import newest_name
from .settings import Settings, TrainingError

SHOWN = ("loss", "cosine_observed", "cosine")  # figures on the terminal, if there are such


class FigureTable:
    """A CSV file, a line of figures for each of some steps; a resumed run drops what is to come.

    Args:
        path: of the CSV file.
        first: steps that the run has done already; lines after that step go.
    """

    def __init__(self, path: Path, first: int):
        self.path = path
        try:
            rows = _rows_until(path, first) if first and path.exists() else []
            with replacing(path) as partial, open(partial, "w", newline="") as file:
                csv.writer(file).writerows(rows)
        except OSError as error:
            raise self._cannot_write(error) from error
        self.columns = rows[0] if rows else []
        self.rows = rows[1:]  # that were there

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a step's figures."""
        try:
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file)
                if not self.columns:
                    self.columns = ["step", *figures]
                    writer.writerow(self.columns)
                # A log that another version began keeps its columns.
                row = [figures.get(name, math.nan) for name in self.columns[1:]]
                writer.writerow([step, *row])
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"Cannot write {self.path} ({error}). Checkpoints are whole, the newest is "
            f"{newest_name(self.path.parent)}. Free disk space, check permissions, and start the "
            "same command again; it continues from there."
        )


class TrainingLog(FigureTable):
    """A run's figures of each step, some of which are printed."""

    def __init__(self, path: Path, first: int, settings: Settings):
        super().__init__(path, first)
        self.first = first
        self.steps = settings.steps
        self.start = time.monotonic()

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a step's figures, and print some of them."""
        super().add(step, figures)
        print(f"\r{self._line(step, figures)} ", end="", flush=True)

    def _line(self, step: int, figures: Mapping[str, float]) -> str:
        shown = "  ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
        speed = f"{figures['images_per_second']:.1f} images/s"
        seconds_a_step = (time.monotonic() - self.start) / (step - self.first)
        left = int(seconds_a_step * (self.steps - step))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"{step}/{self.steps}  {shown}  {speed}  {clock} left"


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """A log's header and its rows up to a step; lines that were cut or damaged are left out.

    A log without its header is of no use: it is renamed, and a new one begins.
    """
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        text = line.decode(errors="replace").replace("\0", "\ufffd")
        if text.endswith("\n"):
            rows += csv.reader([text])
    if rows and not _is_header(rows[0]):
        aside = path.with_name(f"damaged-{path.name}")
        path.replace(aside)
        print(f"{path.name} has lost its first line. It is kept as {aside.name}; a new one begins.")
        return []
    kept = [row for row in rows[1:] if _is_figures(row, len(rows[0])) and int(row[0]) <= step]
    return [*rows[:1], *kept]


def _is_header(row: list[str]) -> bool:
    """Whether a row names its columns as `add` does."""
    return row[:1] == ["step"] and all(cell.isidentifier() for cell in row)


def _is_figures(row: list[str], columns: int) -> bool:
    """Whether a row is as `add` writes it: a step, and a number for each other column."""
    try:
        numbers = [float(cell) for cell in row]
    except ValueError:
        return False
    return len(numbers) == columns and row[0].isdecimal()
