"""The records of manifests without holding them: millions of them, in each of many processes."""

import hashlib
import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np

from ..errors import few
from . import manifest
from .manifest import ManifestError, Record

Place = tuple[int, int]  # a file's bytes and time


class ManifestRecords(Sequence[Record]):
    """The records of one split, of one manifest after the other.

    A process holds 8 bytes a record, where it begins in its file. The file is mapped, so its pages
    are shared by all processes, and the system takes them back when it wants memory. A record is
    read each time it is asked for.

    Where there are several manifests, pictures and masks are named relative to `folder`, which
    holds them all.

    Args:
        paths: manifests.
        split: train, validation or test; None means all.
    Raises:
        ManifestError: as manifest.stream; an id used twice in one file; no common folder.
    """

    def __init__(self, paths: Sequence[Path], split: str | None = None):
        if split is not None:
            manifest.check_split(split)
        self.folder = _common_folder(paths)
        self.files = []
        for path in paths:
            folder = Path(os.path.abspath(path)).parent
            prefix = os.path.relpath(folder, self.folder) if len(paths) > 1 else os.curdir
            self.files.append(_MappedManifest(path, prefix, split))
        self.lengths = [len(file.starts) for file in self.files]  # records of each manifest
        self.ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = int(np.searchsorted(self.ends, place, side="right"))
        return self.files[number].record(place - int(self.ends[number]) + self.lengths[number])

    def __iter__(self) -> Iterator[Record]:
        for file in self.files:
            for number in range(len(file.starts)):
                yield file.record(number)


class _MappedManifest:
    """A manifest, mapped: where the records of a split begin, and they themselves."""

    def __init__(self, path: Path, prefix: str, split: str | None):
        self.path = path
        self.prefix = "" if prefix == os.curdir else f"{prefix.replace(os.sep, '/')}/"
        self.starts = _starts(path, split)
        self.place = _place(path)
        self.content: mmap.mmap | None = None

    def record(self, number: int) -> Record:
        """A record by its number among those of the split."""
        if self.content is None:
            self.content = self._mapped()
        start = int(self.starts[number])
        end = self.content.find(b"\n", start)
        line = self.content[start : end + 1 if end >= 0 else None]
        record = manifest.parse(line)
        if not self.prefix:
            return record
        mask = record.mask and self.prefix + record.mask
        return replace(record, image=self.prefix + record.image, mask=mask)

    def _mapped(self) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ManifestError(
                f"{self.path} cannot be read any more ({error}). Put it back and start again."
            ) from error
        if _place(self.path) != self.place:
            raise ManifestError(
                f"{self.path} has changed since the command was started. Start it again."
            )
        return content

    def __getstate__(self):
        return self.__dict__ | {"content": None}


def _starts(path: Path, split: str | None) -> np.ndarray:
    """Where the lines of a split begin, all lines checked; ManifestError as manifest.stream."""
    starts = array("q")
    digests = array("q")  # of ids
    is_wanted = array("b")
    for start, record in manifest.placed(path):
        starts.append(start)
        digests.append(_digest(record.id))
        is_wanted.append(split is None or record.split == split)
    places = np.array(starts, np.int64)
    _check_unique(path, places, np.array(digests, np.int64))
    return places[np.array(is_wanted, bool)]


def _digest(id: str) -> int:
    digest = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _check_unique(path: Path, starts: np.ndarray, digests: np.ndarray) -> None:
    """Raise ManifestError for the first line whose id an earlier one has."""
    order = np.argsort(digests, kind="stable")
    is_same = digests[order[1:]] == digests[order[:-1]]
    repeated = sorted(order[1:][is_same].tolist())
    if not repeated:
        return
    # Few lines, and with digests of 8 bytes hardly ever of different ids.
    seen = set()
    suspects = set(digests[repeated].tolist())
    for number in np.flatnonzero(np.isin(digests, list(suspects))).tolist():
        with open(path, "rb") as file:
            file.seek(int(starts[number]))
            id = manifest.parse(file.readline()).id
        if id in seen:
            raise manifest.used_twice(path, number + 1, id)
        seen.add(id)


def _place(path: Path) -> Place:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _common_folder(paths: Sequence[Path]) -> Path:
    """The folder that all manifests lie below; as it was given where there is one manifest."""
    if len(paths) == 1:
        return paths[0].parent
    try:
        return Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths]))
    except ValueError as error:
        raise ManifestError(
            f"{few(map(str, paths))} have no folder in common ({error}). Put the manifests below "
            "one folder, or link one there."
        ) from error
