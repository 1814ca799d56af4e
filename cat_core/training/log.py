"""What a run says of itself: a CSV file, and a line on the terminal."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path

from ..files import replacing
from .settings import Settings

SHOWN = ("loss", "cosine_observed", "cosine")  # figures on the terminal, if there are such


class TrainingLog:
    """A CSV line a step; a resumed run drops the lines after its checkpoint first.

    Args:
        path: of the CSV file.
        first: steps that the run has done already.
    """

    def __init__(self, path: Path, first: int, settings: Settings):
        self.path = path
        self.first = first
        self.steps = settings.steps
        self.start = time.monotonic()
        rows = _rows_until(path, first) if first and path.exists() else []
        with replacing(path) as partial, open(partial, "w", newline="") as file:
            csv.writer(file).writerows(rows)
        self.has_header = bool(rows)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a step's figures, and print some of them."""
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if not self.has_header:
                writer.writerow(["step", *figures])
                self.has_header = True
            writer.writerow([step, *figures.values()])
        print(f"\r{self._line(step, figures)} ", end="", flush=True)

    def _line(self, step: int, figures: Mapping[str, float]) -> str:
        shown = "  ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
        speed = f"{figures['images_per_second']:.1f} images/s"
        seconds_a_step = (time.monotonic() - self.start) / (step - self.first)
        left = int(seconds_a_step * (self.steps - step))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"{step}/{self.steps}  {shown}  {speed}  {clock} left"


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """A log's header and its rows up to a step; a line that was cut short is left out."""
    with open(path, newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
    return [header, *kept] if header else []
