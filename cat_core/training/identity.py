"""What a run's result and a cache's content follow from, as facts that can be compared.

A fact is a number or a short text; contents are facts as digests. So what differs can be named.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..config import Tensors
from ..data import members
from ..data.manifest import Record
from ..weights import Checkpoint
from .encoding import Preparation

Facts = Mapping[str, str | int | float | bool]

# Counts up whenever another sample is made of the same files (preprocess.py, data, encoding.py).
PREPROCESSING = 1
PREPROCESSING_CROPS = 2  # of the pictures that are cut instead of squashed
SHOWN = 12  # digits of a digest
CHUNK = 1 << 20  # bytes of a file that are read at once


def differences(before: Facts, now: Facts) -> list[str]:
    """What differs among the facts that both have, in words."""
    changes = []
    for name, value in now.items():
        if name in before and before[name] != value:
            changes.append(f"{name} was {before[name]}, is {value}")
    return changes


def of_records(records: Sequence[Record]) -> dict[str, str | int]:
    """Everything that a manifest says of the records."""
    fields = {
        "ids": ("id",),
        "labels": ("label",),
        "captions": ("caption",),
        "names of pictures": ("image",),
        "holes": ("mask", "box"),
    }
    digests = {name: hashlib.sha256() for name in fields}
    for record in records:  # once: each may be read from a file
        for name, digest in digests.items():
            _add_fields(digest, record, fields[name])
    facts: dict[str, str | int] = {"number of records": len(records)}
    return facts | {name: _short(digest) for name, digest in digests.items()}


def of_record(record: Record) -> str:
    """Everything that a manifest says of a record, but for its split."""
    digest = hashlib.sha256()
    _add_fields(digest, record, ("id", "image", "mask", "box", "label", "caption"))
    return _short(digest)


def of_sizes(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """How large the files of the records are, by which changed ones show.

    Times are left out: a copy of the data is the same data.
    """
    digest = hashlib.sha256()
    for record in records:
        for name in files_of(record):
            digest.update(f"{size_of(folder / name)}\n".encode())
    return {"sizes of picture and mask files": _short(digest)}


def of_preparation(how: Preparation) -> dict[str, str | float | bool]:
    """How samples are cut and described; what older versions did is left unsaid."""
    facts: dict[str, str | float | bool] = {}
    if how.pictures != "squash":
        facts |= {"preprocessing": PREPROCESSING_CROPS, "pictures": how.pictures, "flip": how.flip}
    if how.caption_share is not None:
        facts["caption_share"] = how.caption_share
    return facts


def of_parts(file: Checkpoint, parts: Iterable[str]) -> dict[str, str]:
    """The contents of parts: their tensors, and how these are put together."""
    facts = {}
    for part in parts:
        digest = hashlib.sha256()
        for attribute in (part, f"{part}_num_heads"):
            digest.update(repr(getattr(file.architecture, attribute, None)).encode())
        _add_tensors(digest, file.parts.get(part, {}))
        facts[f"weights of {part}"] = _short(digest)
    return facts


def files_of(record: Record) -> list[str]:
    """The files that a record's samples are made of, relative to the manifest's folder."""
    return [record.image] if record.mask is None else [record.image, record.mask]


def size_of(path: Path) -> int:
    """A file's size in bytes, -1 where there is none."""
    try:
        size, _ = members.size_and_time(path)
        return size
    except OSError:
        return -1


def of_file(path: Path) -> str:
    """The digest of a file's bytes; raises OSError."""
    digest = hashlib.sha256()
    with members.opened(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _add_fields(digest, record: Record, names: Sequence[str]) -> None:
    digest.update(json.dumps([getattr(record, name) for name in names]).encode())


def _add_tensors(digest, tensors: Tensors) -> None:
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def _short(digest) -> str:
    return digest.hexdigest()[:SHOWN]
