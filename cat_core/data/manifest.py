"""The training data manifest: which pictures, holes and words a training run sees.

JSON lines in UTF-8, one object a line (here broken for reading):

    {"id": "611c_8ae4", "image": "train/611c.jpg", "mask": "masks/6/611c_8ae4.png",
     "box": [0.1, 0.2, 0.6, 0.9], "label": "Bus", "caption": "a red bus in the rain",
     "split": "train"}

    id       unique in the file
    image    path of the picture, relative to the manifest's folder, with forward slashes
    mask     path of a mask picture, white = object; optional
    box      [x0, y0, x1, y1], the object's corners as fractions of width and height; optional
    label    the object's name; optional only where there is neither mask nor box
    caption  a longer description; optional
    split    train, validation or test; train if left out

Neither mask nor box means a hole-free image, which needs a caption or a label. Other keys are
errors, and so are paths that lead out of the manifest's folder. Links inside that folder are
followed: whoever keeps the data elsewhere links it in. `tools/prepare_data.py` writes manifests for
the usual data sets.
"""

import json
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from .. import files
from ..errors import CatError

SPLITS = ("train", "validation", "test")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in [0, 1]


class ManifestError(CatError):
    """A manifest that cannot be used.

    The message names file and line, says what was found and what was expected.
    """


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a manifest, checked when it is made (ManifestError).

    About 0.5 kB: manifest_records.py is for millions of them.
    """

    id: str
    image: str
    mask: str | None = None
    box: Box | None = None
    label: str | None = None
    caption: str | None = None
    split: str = "train"

    def __post_init__(self):
        for name in ("id", "image"):
            _check_text(name, getattr(self, name))
        for name in ("mask", "label", "caption"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        _check_path("image", self.image)
        if self.mask is not None:
            _check_path("mask", self.mask)
        if self.box is not None:
            _check_box(self.box)
        check_split(self.split)
        if self.label is None and self.hole:
            raise ManifestError("label is missing, expected the name of the object in the hole")
        if self.label is None and self.caption is None:
            raise ManifestError("nothing describes the image, expected a caption or a label")

    @property
    def hole(self) -> bool:
        """Whether there is something to inpaint."""
        return self.mask is not None or self.box is not None


# Reading and writing ------------------------------------------------------------------------------


def read(path: str | os.PathLike, split: str | None = None) -> list[Record]:
    """All records of a manifest, or those of one split; arguments and errors as `stream`."""
    return list(stream(path, split))


def stream(path: str | os.PathLike, split: str | None = None) -> Iterator[Record]:
    """The records of a manifest one by one, in the file's order.

    The file is never in memory as a whole.

    Args:
        path: the manifest.
        split: train, validation or test; None means all. Lines of other splits are checked all the
            same.
    Raises:
        ManifestError: no such file, no such split, a malformed line or an id used twice.
    """
    if split is not None:
        check_split(split)
    seen = set()
    for number, (_, record) in enumerate(placed(path), 1):
        if record.id in seen:
            raise used_twice(path, number, record.id)
        seen.add(record.id)
        if split is None or record.split == split:
            yield record


def placed(path: str | os.PathLike) -> Iterator[tuple[int, Record]]:
    """Each record of a manifest and where its line begins in the file, in bytes.

    Errors as `stream`, but ids may be used twice.
    """
    start = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = parse(line)
                except ManifestError as error:
                    raise _in_line(path, number, error) from None
                yield start, record
                start += len(line)
    except OSError as error:
        raise ManifestError(
            f"{path} cannot be read ({error.strerror}), expected a manifest. "
            "Write one with tools/prepare_data.py."
        ) from error


def used_twice(path: str | os.PathLike, number: int, id: str) -> ManifestError:
    """What is wrong with a line whose id an earlier one has."""
    return _in_line(path, number, f"id {_short(id)} was used before, expected every id once")


def _in_line(path: str | os.PathLike, number: int, error: object) -> ManifestError:
    return ManifestError(
        f"{path}, line {number}: {error}. Correct the line or prepare the data again."
    )


def write(path: str | os.PathLike, records: Iterable[Record]) -> int:
    """Write a manifest; an old file stays whole until the new one is.

    `records` may be a generator of any length. Returns how many there were.
    Raises ManifestError for an id used twice and for a disk that is full or read-only.
    """
    path = Path(path)
    seen = set()
    try:
        # In ASCII: JSON escapes the bytes of file names that are no UTF-8 (lone surrogates).
        with (
            files.replacing(path) as partial,
            open(partial, "w", encoding="ascii", newline="\n") as file,
        ):
            for record in records:
                if record.id in seen:
                    raise ManifestError(
                        f"id {_short(record.id)} is used twice, expected every id once; "
                        f"{path} was not written"
                    )
                seen.add(record.id)
                file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ManifestError(
            f"Cannot write {path}: {error}. Check free space and permissions; "
            "an older manifest was not touched."
        ) from error
    return len(seen)


_KEYS = tuple(field.name for field in fields(Record))


def _line(record: Record) -> str:
    entry = {}
    for key in _KEYS:
        value = getattr(record, key)
        if value is not None:
            entry[key] = value
    return json.dumps(entry) + "\n"


def parse(line: bytes) -> Record:
    """A manifest's line as a record; raises ManifestError."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"found {_short(line)}, expected one JSON object in UTF-8 ({error})"
        ) from None
    if not isinstance(entry, dict):
        raise ManifestError(f"found {_short(entry)}, expected a JSON object")
    for key in entry:
        if key not in _KEYS:
            raise ManifestError(f"unknown key {_short(key)}, expected only {', '.join(_KEYS)}")
    for key in ("id", "image"):
        if key not in entry:
            raise ManifestError(f"{key} is missing, expected a string")
    if isinstance(entry.get("box"), list):
        entry["box"] = tuple(entry["box"])
    for name in ("label", "split"):  # few different values, kept once
        if isinstance(entry.get(name), str):
            entry[name] = sys.intern(entry[name])
    return Record(**entry)


def _check_text(name: str, text: str) -> None:
    if not (isinstance(text, str) and text.strip()):
        raise ManifestError(f"{name} is {_short(text)}, expected a string that is not empty")


def check_split(split: str) -> None:
    """Raise ManifestError unless it is a split."""
    if split not in SPLITS:
        *others, last = SPLITS
        raise ManifestError(f"split is {_short(split)}, expected {', '.join(others)} or {last}")


def _check_path(name: str, path: str) -> None:
    has_drive = len(path) > 1 and path[1] == ":" and path[0].isalpha()
    leads_out = has_drive or path.startswith("/") or ".." in path.split("/")
    if leads_out or "\\" in path or "\0" in path:
        raise ManifestError(
            f"{name} is {_short(path)}, expected a relative path with forward slashes that stays "
            "in the manifest's folder"
        )


def _check_box(box: Box) -> None:
    if not _is_box(box):
        raise ManifestError(
            f"box is {_short(box)}, expected [x0, y0, x1, y1] as fractions, 0 <= x0 < x1 <= 1 and "
            "0 <= y0 < y1 <= 1"
        )


def _is_box(box: Box) -> bool:
    if not isinstance(box, tuple) or len(box) != 4:
        return False
    if not {type(corner) for corner in box} <= {int, float}:  # bool is no number here
        return False
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def _short(value) -> str:
    return reprlib.repr(value)
