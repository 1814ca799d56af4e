"""One file of a cache: encoded samples, what they were encoded of, and how that is told later."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import save_file

from ..data import members
from ..data.masks import VARIANTS
from . import identity
from .encoding import OF_SEQUENCES, Sample

BOTH = "both"  # a shard's kind for what is the same in every variant
ROWS = "records"  # a shard's tensor that says which records a kind's rows are
STEPS = ":steps"  # follows the name of a tensor in int8: what 1 is worth in each of its columns
HEADER = "about"  # one entry, since the order of several changes from file to file
UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError)

Stamp = list | None  # a file's [bytes, time, digest], None where there is none
Rows = dict[tuple[str, int], Sample]  # (kind, record) -> what is held of it


class About(NamedTuple):
    """What a shard was encoded of, and holds."""

    files: dict[str, Stamp]
    contents: dict[int, str]  # record -> what the manifest says of it, see identity.of_record
    held: frozenset[str]  # keys of a sample


class Shard:
    """A file of encoded samples, opened: its tensors are called KIND.KEY, with a row a record.

    The kind is a variant, or "both". KIND.records says which records the rows are.
    Args:
        reads: keys that a sample has; None means all.
    """

    def __init__(self, path: Path, reads: frozenset[str] | None = None):
        self.file = safetensors.safe_open(path, framework="pt")
        self.keys: dict[str, list[str]] = {kind: [] for kind in (*VARIANTS, BOTH)}
        self.rows: dict[str, dict[int, int]] = {}  # kind -> record -> row
        self.steps: dict[str, torch.Tensor] = {}  # of tensors in int8
        for name in self.file.keys():  # noqa: SIM118 - an open file is no mapping
            kind, key = name.split(".")
            if key == ROWS:
                records = self.file.get_tensor(name).tolist()
                self.rows[kind] = {record: row for row, record in enumerate(records)}
            elif key.endswith(STEPS):
                self.steps[name.removesuffix(STEPS)] = self.file.get_tensor(name)
            elif reads is None or key in reads:
                self.keys[kind].append(key)

    def about(self) -> About:
        """What the shard was encoded of."""
        header = self.file.metadata() or {}
        if HEADER not in header:
            return About({}, {}, frozenset())
        files, contents, held = json.loads(header[HEADER])
        return About(files, {int(index): text for index, text in contents.items()}, frozenset(held))

    def sample(self, index: int, variant: str) -> Sample | None:
        """A sample's tensors, or None if the shard has none."""
        if index not in self.rows.get(variant, {}):
            return None
        return self._row(index, variant) | self._row(index, BOTH)

    def rows_of(self, indices: Sequence[int]) -> Rows:
        """What is held of records."""
        rows = {}
        for kind, places in self.rows.items():
            for index in indices:
                if index in places:
                    rows[kind, index] = self._row(index, kind)
        return rows

    def _row(self, index: int, kind: str) -> Sample:
        sample = {}
        for key in self.keys[kind]:
            row = self.rows[kind][index]
            name = f"{kind}.{key}"
            value = self.file.get_slice(name)[row]
            if name in self.steps:
                value = (value.float() * self.steps[name]).half()
            sample[key] = value
        return sample


def save_shard(path: Path, rows: Rows, about: About, dtype: str = "fp16") -> None:
    """Write what `Shard` opens.

    Args:
        rows: all of a kind have the same keys.
        dtype: one of stages.CACHE_DTYPES.
    """
    header = json.dumps([about.files, about.contents, sorted(about.held)])
    tensors = _stacked(rows)
    if dtype == "int8":
        tensors = _in_bytes(tensors)
    save_file(tensors, path, metadata={HEADER: header})


def _in_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with features of pictures in int8, in steps of each column's own.

    Some columns of CLIP's features are tens of times as large as the others, always the same ones.
    """
    smaller = {}
    for name, tensor in tensors.items():
        if name.split(".")[1] not in OF_SEQUENCES:
            smaller[name] = tensor
            continue
        values = tensor.float()
        largest = values.flatten(0, -2).abs().amax(0)
        steps = largest.clamp_min(torch.finfo(torch.float32).tiny) / 127
        smaller[name] = (values / steps).round().to(torch.int8)
        smaller[f"{name}{STEPS}"] = steps
    return smaller


def _stacked(rows: Rows) -> dict[str, torch.Tensor]:
    """Rows as a shard's tensors."""
    tensors = {}
    for kind in (*VARIANTS, BOTH):
        indices = sorted(index for of_kind, index in rows if of_kind == kind)
        tensors[f"{kind}.{ROWS}"] = torch.tensor(indices, dtype=torch.int64)
        for key in rows[kind, indices[0]] if indices else ():
            tensors[f"{kind}.{key}"] = torch.stack([rows[kind, index][key] for index in indices])
    return tensors


def stamp(path: Path) -> Stamp:
    """A file's size, time and content; None where there is none."""
    try:
        size, time = members.size_and_time(path)
        return [size, time, identity.of_file(path)]
    except OSError:
        return None


def has_changed(path: Path, before: Stamp) -> bool:
    """Whether a file is another one; one that is gone counts as unchanged, it is not needed."""
    try:
        size_now, time_now = members.size_and_time(path)
    except OSError:
        return False
    if before is None:
        return True
    size, time, content = before
    if size_now != size:
        return True
    # A copy of the data has other times.
    return time_now != time and identity.of_file(path) != content
