"""The training data manifest: which pictures, holes and words a training run sees.

JSON lines in UTF-8, one object a line (here broken for reading):

    {"id": "611c_8ae4", "image": "train/611c.jpg", "mask": "masks/6/611c_8ae4.png", "box": [0.1, 0.2, 0.6, 0.9],
     "label": "Bus", "caption": "a red bus in the rain", "split": "train"}

    id       unique in the file
    image    path of the picture, relative to the manifest's folder, with forward slashes
    mask     path of a mask picture, white = object; optional
    box      [x0, y0, x1, y1], the object's corners as fractions of width and height; optional
    label    the object's name; optional only where there is neither mask nor box
    caption  a longer description; optional
    split    train, validation or test; train if left out

Neither mask nor box means a hole-free image, which needs a caption or a label. Other keys are errors, and so are paths
that lead out of the manifest's folder. Links inside that folder are followed: whoever keeps the data elsewhere links
it in. `tools/prepare_data.py` writes manifests for the usual data sets.
"""

import json
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import CatError

SPLITS = ("train", "validation", "test")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in [0, 1]


class ManifestError(CatError):
    """A manifest that cannot be used; the message names file and line, says what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a manifest, checked when it is made (ManifestError). About 0.5 kB, so 3 million fit into 2 GB."""

    id: str
    image: str
    mask: str | None = None
    box: Box | None = None
    label: str | None = None
    caption: str | None = None
    split: str = "train"

    def __post_init__(self):
        for name in ("id", "image", "mask", "label", "caption"):
            value = getattr(self, name)
            if (value is not None or name in ("id", "image")) and not (
                isinstance(value, str) and value.strip()
            ):
                raise ManifestError(
                    f"{name} is {_short(value)}, expected a string that is not empty"
                )
        for name in ("image", "mask"):
            _check_path(name, getattr(self, name))
        if self.box is not None:
            _check_box(self.box)
        if self.split not in SPLITS:
            raise ManifestError(
                f"split is {_short(self.split)}, expected {', '.join(SPLITS[:-1])} or {SPLITS[-1]}"
            )
        if self.label is None and (self.hole or self.caption is None):
            raise ManifestError(
                "label is missing, expected the name of the object in the hole"
                if self.hole
                else "nothing describes the image, expected a caption or a label"
            )

    @property
    def hole(self) -> bool:
        """Whether there is something to inpaint."""
        return self.mask is not None or self.box is not None


# Reading and writing ------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike, split: str | None = None) -> list[Record]:
    """All records of a manifest, or those of one split; arguments and errors as `stream`."""
    return list(stream(path, split))


def stream(path: str | os.PathLike, split: str | None = None) -> Iterator[Record]:
    """The records of a manifest one by one, in the file's order; the file is never in memory as a whole.

    Args:
        path: the manifest.
        split: train, validation or test; None means all. Lines of other splits are checked all the same.
    Raises:
        ManifestError: no such file, no such split, a malformed line or an id used twice.
    """
    if split not in (None, *SPLITS):
        raise ManifestError(
            f"split is {_short(split)}, expected {', '.join(SPLITS[:-1])} or {SPLITS[-1]}"
        )
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ManifestError(
            f"{path} cannot be read ({error.strerror}), expected a manifest. "
            "Write one with tools/prepare_data.py."
        ) from error
    seen = set()
    with file:
        for number, line in enumerate(file, 1):
            try:
                record = _parse(line)
                if record.id in seen:
                    raise ManifestError(
                        f"id {_short(record.id)} was used before, expected every id once"
                    )
            except ManifestError as error:
                raise ManifestError(
                    f"{path}, line {number}: {error}. Correct the line or prepare the data again."
                ) from None
            seen.add(record.id)
            if split is None or record.split == split:
                yield record


def write(path: str | os.PathLike, records: Iterable[Record]) -> int:
    """Write a manifest to a temporary name beside `path`, then rename it; an old file stays whole until then.

    `records` may be a generator of any length. Returns how many there were.
    Raises ManifestError for an id used twice and for a disk that is full or read-only.
    """
    path, seen = Path(path), set()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="ascii", newline="\n") as file:
            for record in records:
                if record.id in seen:
                    raise ManifestError(
                        f"id {_short(record.id)} is used twice, expected every id once; {path} was not written"
                    )
                seen.add(record.id)
                line = {key: getattr(record, key) for key in _KEYS}
                file.write(
                    json.dumps({key: value for key, value in line.items() if value is not None})
                    + "\n"
                )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ManifestError(
            f"Cannot write {path}: {error}. Check free space and permissions; "
            "an older manifest was not touched."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return len(seen)


_KEYS = tuple(field.name for field in fields(Record))


def _parse(line: bytes) -> Record:
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"found {_short(line)}, expected one JSON object in UTF-8 ({error})"
        ) from None
    if not isinstance(found, dict):
        raise ManifestError(f"found {_short(found)}, expected a JSON object")
    for key in found:
        if key not in _KEYS:
            raise ManifestError(f"unknown key {_short(key)}, expected only {', '.join(_KEYS)}")
    for key in ("id", "image"):
        if key not in found:
            raise ManifestError(f"{key} is missing, expected a string")
    if isinstance(found.get("box"), list):
        found["box"] = tuple(found["box"])
    for name in ("label", "split"):  # few different values, kept once
        if isinstance(found.get(name), str):
            found[name] = sys.intern(found[name])
    return Record(**found)


def _check_path(name: str, path: str | None) -> None:
    if path is None:
        return
    drive = len(path) > 1 and path[1] == ":" and path[0].isalpha()
    if drive or path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise ManifestError(
            f"{name} is {_short(path)}, expected a relative path with forward slashes that stays in the "
            "manifest's folder"
        )


def _check_box(box: Box) -> None:
    numbers = isinstance(box, tuple) and len(box) == 4 and set(map(type, box)) <= {int, float}
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ManifestError(
            f"box is {_short(box)}, expected [x0, y0, x1, y1] as fractions, 0 <= x0 < x1 <= 1 and "
            "0 <= y0 < y1 <= 1"
        )


def _short(value) -> str:
    return reprlib.repr(value)
