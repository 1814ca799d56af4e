"""Files that lie in tar shards, as webdataset's do, and are named with their place there.

"train-000000.tar/00017.jpg@51712+48211" is 48,211 bytes of train-000000.tar from byte 51,712 on. So
any sample can be read at any time, which a stream of shards cannot give: a batch depends on its
step alone. Places are found once, by the standard library's tarfile (tools/training/tar_shards.py).
"""

import io
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

NAMED = re.compile(r"(?P<tar>.+\.tar)/.+@(?P<start>\d+)\+(?P<length>\d+)", re.DOTALL)


class CutShardError(OSError):
    """A shard that ends before the file does that should lie in it."""


class Place(NamedTuple):
    """Where a file lies in a shard, in bytes."""

    tar: Path
    start: int
    length: int


def name(tar: str, member: str, start: int, length: int) -> str:
    """How a manifest names a file in a shard."""
    return f"{tar}/{member}@{start}+{length}"


def place_of(path: Path) -> Place | None:
    """Where a named file lies; None for a file of its own."""
    found = NAMED.fullmatch(path.as_posix())
    if found is None or path.exists():
        return None
    return Place(Path(found["tar"]), int(found["start"]), int(found["length"]))


def opened(path: Path) -> BinaryIO:
    """A file, in a shard or of its own; raises OSError."""
    place = place_of(path)
    if place is None:
        return open(path, "rb")
    with open(place.tar, "rb") as tar:
        tar.seek(place.start)
        content = tar.read(place.length)
    if len(content) < place.length:
        raise CutShardError(f"{place.tar} ends {place.length - len(content):,} bytes too early")
    return io.BytesIO(content)


def is_file(path: Path) -> bool:
    """Whether there is such a file, in a shard or of its own."""
    place = place_of(path)
    if place is None:
        return path.is_file()
    try:
        return place.tar.stat().st_size >= place.start + place.length
    except OSError:
        return False


def size_and_time(path: Path) -> tuple[int, int]:
    """A file's bytes, and when it or its shard was written, in nanoseconds; raises OSError."""
    place = place_of(path)
    status = os.stat(path if place is None else place.tar)
    return status.st_size if place is None else place.length, status.st_mtime_ns
