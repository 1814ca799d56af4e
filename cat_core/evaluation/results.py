"""What is compared: a manifest's pictures and holes, and folders of finished pictures made for them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data import manifest, masks
from .metrics import EvaluationError

RUN, FAILED = "run.json", "failed.jsonl"
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Results:
    """A folder with `<id>.png` for each sample, in `run.json` how they were made and in `failed.jsonl` what could not be."""

    folder: Path
    run: dict

    @classmethod
    def open(cls, folder: Path) -> "Results":
        """Read run.json, if there is one; raises EvaluationError."""
        if not folder.is_dir():
            raise EvaluationError(
                f"{folder} is not a folder, expected one with a PNG for each sample. "
                "Make them with tools/generate.py."
            )
        path = folder / RUN
        try:
            run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not isinstance(run, dict):
                raise ValueError(f"found a {type(run).__name__}")
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{path} cannot be read ({error}), expected a JSON object. Delete it and give --manifest, "
                "--split, --hole and --size yourself."
            ) from error
        return cls(folder, run)

    @property
    def failed(self) -> set[str]:
        """Ids of the samples that could not be made; raises EvaluationError."""
        path = self.folder / FAILED
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            return {json.loads(line)["id"] for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f'{path} cannot be read ({error}), expected lines such as {{"id": "611c"}}. Delete it and '
                "let tools/generate.py write it again."
            ) from error

    @property
    def ids(self) -> set[str]:
        """Of the pictures that are there."""
        return {
            path.name.removesuffix(".png")
            for path in self.folder.iterdir()
            if path.name.endswith(".png")
        }

    def picture(self, id: str, size: int) -> Image.Image:
        """The finished picture, RGB, size x size; raises EvaluationError."""
        with self._open(id, size) as file:
            return file.convert("RGB")

    def check(self, id: str, size: int) -> None:
        """Raise EvaluationError unless the file's header tells of a picture of that size; its pixels are not read."""
        with self._open(id, size):
            pass

    @contextmanager
    def _open(self, id: str, size: int) -> Iterator[Image.Image]:
        path = self.folder / f"{id}.png"
        try:
            with Image.open(path) as file:
                if file.size != (size, size):
                    raise EvaluationError(
                        f"{path} is {file.width}x{file.height}, expected {size}x{size}. Give the --size that "
                        "it was made with, or delete it and let tools/generate.py make it again."
                    )
                yield file
        except EvaluationError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for what is broken
            raise EvaluationError(
                f"{path} cannot be decoded ({error}), expected a PNG. Delete it and let tools/generate.py "
                "make it again."
            ) from error


@dataclass(frozen=True)
class Sample:
    """One record's picture and hole, as a method saw them."""

    record: manifest.Record
    picture: Image.Image  # RGB, size x size, nothing removed
    hole: Image.Image  # L, size x size, white = repaint


@dataclass(frozen=True)
class SampleSet:
    """Records of a manifest and the holes cut into them.

    Args:
        hole: segment or box, see masks.training_mask.
        size: side of the pictures in pixels.
    """

    manifest: Path
    split: str | None  # None = all
    hole: str
    size: int
    records: tuple[manifest.Record, ...] = ()

    def read(self) -> "SampleSet":
        """With the manifest's records that have an object; raises manifest.ManifestError."""
        records = tuple(
            record for record in manifest.stream(self.manifest, self.split) if record.hole
        )
        return dataclasses.replace(self, records=records)

    def sample(self, record: manifest.Record) -> Sample:
        """Open a record's files; raises EvaluationError."""
        try:
            picture, mask = masks.load(record, self.manifest.parent)
            hole = masks.training_mask(mask, self.hole)
        except masks.SampleError as error:
            raise EvaluationError(
                f"{record.id} of {self.manifest} cannot be used: {error}. Repair the data, or delete the "
                "pictures made from it and give --common."
            ) from error
        size = (self.size, self.size)
        return Sample(record, picture.resize(size, _BICUBIC), hole.resize(size, _BICUBIC))

    def of_all(self, folders: Sequence[Results], common: bool) -> tuple["SampleSet", list[str]]:
        """With the records that every folder has a picture of, each checked by its header, and notes on what was left out.

        What failed in one folder is left out of all.

        Args:
            common: leave out what is missing for other reasons, too. Without it that is an error.
        Raises:
            EvaluationError: pictures are missing, belong to no record, are of another size or fewer than 2.
        """
        wanted, found, notes, problems = {record.id: record for record in self.records}, [], [], []
        for results in folders:
            failed, ids = results.failed, results.ids
            missing, unknown = (
                [id for id in wanted if id not in ids | failed],
                sorted(ids - set(wanted)),
            )
            if missing and not common:
                problems.append(
                    f"{results.folder} lacks {len(missing)} of {len(wanted)} pictures: {_few(missing)}."
                )
            if unknown and not common:
                problems.append(
                    f"{results.folder} has {len(unknown)} pictures that no record asks for: {_few(unknown)}."
                )
            if lost := [id for id in wanted if id in failed - ids]:
                notes.append(
                    f"{len(lost)} samples are left out, since they failed in {results.folder}: {_few(lost)}."
                )
            found.append(ids)
        shared = [id for id in wanted if all(id in ids for ids in found)]
        if problems:
            raise EvaluationError(
                f"The pictures do not match {self._name()}. {' '.join(problems)} Let tools/generate.py finish, "
                f"give the manifest and split they were made from, or evaluate the {len(shared)} that all "
                "have with --common."
            )
        if len(shared) < 2:
            raise EvaluationError(
                f"{len(shared)} of {len(wanted)} pictures of {self._name()} to evaluate; FID and intervals need "
                "at least 2. Evaluate more pictures."
            )
        if common and len(shared) < len(wanted):
            notes.append(
                f"Only the {len(shared)} of {len(wanted)} pictures that all folders have were evaluated."
            )
        for results in folders:
            for id in shared:
                results.check(id, self.size)
        return dataclasses.replace(self, records=tuple(wanted[id] for id in shared)), notes

    def _name(self) -> str:
        return f"{self.manifest} ({f'split {self.split}' if self.split else 'all splits'})"


def square_around_hole(hole: Image.Image, enlarge: float) -> tuple[int, int, int, int]:
    """The crop around an object: the smallest square over the hole's bounding box, its side times `enlarge`.

    The square has the box's centre, is moved inside the picture where it sticks out, and is as large as the picture at most.

    Args:
        hole: L, white = repaint; 128 and above counts.
        enlarge: 1 or more.
    Returns:
        left, top, right, bottom in pixels; always a square.
    """
    x0, y0, x1, y1 = hole.point(lambda value: 255 * (value >= masks.MASKED)).getbbox() or (
        0,
        0,
        *hole.size,
    )
    side = min(round(max(x1 - x0, y1 - y0) * enlarge), *hole.size)
    left = min(max(round((x0 + x1 - side) / 2), 0), hole.width - side)
    top = min(max(round((y0 + y1 - side) / 2), 0), hole.height - side)
    return left, top, left + side, top + side


def _few(ids: Sequence[str], most: int = 5) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
