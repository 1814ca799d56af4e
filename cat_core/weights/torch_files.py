"""Files that torch.save wrote: where each tensor's numbers lie, zipped or in the form before 1.6.

The pickle in them is read by a machine that can call nothing; see inert_pickle.py.
"""

import mmap
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import few
from .inert_pickle import ForeignName, InertMachine, InertObject, Uses

# torch/serialization.py (MAGIC_NUMBER, PROTOCOL_VERSION): how a file before 1.6 begins.
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2")
_DICTIONARIES = ("OrderedDict", "defaultdict", "Counter", "dict")
_LISTS = ("deque", "list", "tuple", "set", "frozenset")
_BUILTINS = ("builtins", "__builtin__", "collections")


class TorchFileError(ValueError):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class PickledStorage:
    """A run of numbers somewhere in the file, as its pickle states it."""

    key: str
    dtype: torch.dtype
    whole: int  # numbers under that key
    start: int  # the first of them that is meant
    length: int  # how many are meant


@dataclass(frozen=True)
class PickledTensor:
    """A tensor without its numbers."""

    storage: PickledStorage
    offset: int  # in numbers, from the start of the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""
        return self.storage.dtype

    @property
    def size(self) -> int:
        """Bytes that a copy of it takes."""
        return prod(self.shape) * self.dtype.itemsize

    def described(self) -> torch.Tensor:
        """The same on the meta device, that is shape and type."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class TorchFile:
    """What a file holds, and where.

    Args:
        content: as it was saved, with PickledTensor for tensors and InertObject for the rest.
        names: the classes and functions that its pickle names, and what it does with them.
        regions: (first byte, number of bytes) of each storage.
        size: of the whole file, in bytes.
        time: of its last change, in nanoseconds.
    """

    path: Path
    content: Any
    names: Mapping[ForeignName, Uses] = field(default_factory=dict)
    regions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0
    time: int = 0

    def tensors(self, wanted: Mapping[str, PickledTensor], mapped: bool) -> dict[str, torch.Tensor]:
        """The numbers, in one mapping of the file or read into memory.

        Raises OSError if the file is not the one that was opened.
        """
        status = os.stat(self.path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.time):
            raise OSError("it is another file now")
        if mapped:
            content = torch.from_file(str(self.path), size=self.size, dtype=torch.uint8)
        else:
            content = torch.frombuffer(self._bytes(), dtype=torch.uint8)
        tensors = {}
        for name, tensor in wanted.items():
            first, count = self.regions[tensor.storage.key]
            stored = content[first : first + count]
            if first % tensor.dtype.itemsize:  # numbers of the older form lie anywhere
                stored = stored.clone()
            numbers = stored.view(tensor.dtype)
            start = numbers.storage_offset() + tensor.storage.start + tensor.offset
            tensors[name] = numbers.as_strided(tensor.shape, tensor.stride, start)
        return tensors

    def _bytes(self) -> bytearray:
        """The whole file."""
        content = bytearray(self.size)
        with open(self.path, "rb") as file:
            if file.readinto(content) != self.size:
                raise OSError("it ended too early")
        return content


def open_torch_file(path: Path) -> TorchFile:
    """Read the pickle of a file and find its storages; no number is read.

    Raises TorchFileError for what cannot be used, zipfile.BadZipFile, ValueError, TypeError,
    IndexError and KeyError for what is damaged, and OSError.
    """
    status = os.stat(path)
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    opened = _open_zipped(path, status.st_size) if zipped else _open_older(path)
    return replace(opened, size=status.st_size, time=status.st_mtime_ns)


# Two forms ----------------------------------------------------------------------------------------


def _open_zipped(path: Path, file_size: int) -> TorchFile:
    """Since 1.6: a zip with data.pkl and a record for each storage, none of them compressed."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {}
        for record in archive.infolist():
            if record.filename in records:
                raise TorchFileError(f"its zip holds {record.filename!r} twice")
            records[record.filename] = record
        pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise TorchFileError(f"its zip holds {len(pickles)} files data.pkl, expected one")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in records:
            raise TorchFileError("it is a TorchScript program, expected a checkpoint of torch.save")

        def region(name: str) -> tuple[int, int]:
            if name not in records:
                raise TorchFileError(f"its zip lacks {name!r}")
            return _region(file, records[name], file_size)

        def content_of(name: str) -> bytes:
            first, count = region(name)
            file.seek(first)
            return file.read(count)

        if f"{root}byteorder" in records and content_of(f"{root}byteorder") == b"big":
            raise TorchFileError("its numbers are big-endian, expected little-endian")
        builder = _TorchBuilder()
        machine = InertMachine(builder.build, builder.storage)
        content = machine.run(BytesIO(content_of(pickles[0])))
        regions = {key: region(f"{root}data/{key}") for key in builder.storages}
    _check_sizes(builder.storages, regions)
    return TorchFile(path, content, machine.names, regions)


def _region(file, record: zipfile.ZipInfo, file_size: int) -> tuple[int, int]:
    """(first byte, number of bytes) of an uncompressed record, by the header in front of it."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise TorchFileError(
            f"{record.filename!r} in its zip is compressed or encrypted, expected it as it is"
        )
    file.seek(record.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise TorchFileError(f"{record.filename!r} in its zip is not where the zip says")
    name_size = int.from_bytes(header[26:28], "little")
    extra_size = int.from_bytes(header[28:30], "little")
    first = record.header_offset + 30 + name_size + extra_size
    if first + record.file_size > file_size or record.file_size != record.compress_size:
        raise TorchFileError(f"{record.filename!r} in its zip reaches beyond its end")
    return first, record.file_size


def _open_older(path: Path) -> TorchFile:
    """Before 1.6: five pickles, then the storages one after the other, each after its length."""
    builder = _TorchBuilder()
    machine = InertMachine(builder.build, builder.storage)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
    ):
        first = machine.run(pages)
        if first != _MAGIC:
            names = few(str(name) for name in machine.names)
            inside = f", with {names} in it" if names else ""
            raise TorchFileError(f"it is a pickle that torch.save did not write{inside}")
        protocol = machine.run(pages)
        system = machine.run(pages)
        if protocol != _PROTOCOL or not isinstance(system, dict):
            raise TorchFileError("it is of a form that only very old versions of PyTorch read")
        if system.get("little_endian") is False:
            raise TorchFileError("its numbers are big-endian, expected little-endian")
        content = machine.run(pages)
        keys = machine.run(pages)
        regions = _regions_in_turn(pages, keys, builder.storages)
    _check_sizes(builder.storages, regions)
    return TorchFile(path, content, machine.names, regions)


def _regions_in_turn(pages, keys: Any, storages: Mapping) -> dict[str, tuple[int, int]]:
    """(first byte, number of bytes) of storages that follow one another."""
    regions = {}
    position = pages.tell()
    for key in keys:
        storage = storages[key]
        length = int.from_bytes(pages[position : position + 8], "little", signed=True)
        if length != storage.whole:
            raise TorchFileError(
                f"storage {key!r} has {length:,} numbers, its pickle says {storage.whole:,}"
            )
        size = length * storage.dtype.itemsize
        regions[key] = (position + 8, size)
        position += 8 + size
    if position > len(pages):
        raise TorchFileError(f"it ends {position - len(pages):,} bytes too early")
    return regions


def _check_sizes(storages: Mapping[str, PickledStorage], regions: Mapping) -> None:
    """Raise TorchFileError unless every storage has the bytes that its pickle says."""
    for key, storage in storages.items():
        expected = storage.whole * storage.dtype.itemsize
        if key not in regions:
            raise TorchFileError(f"it lacks storage {key!r}")
        found = regions[key][1]
        if found != expected:
            raise TorchFileError(
                f"storage {key!r} has {found:,} bytes, its pickle says {expected:,}"
            )


# What PyTorch's own names mean --------------------------------------------------------------------


class _TorchBuilder:
    """Makes data of the calls in a pickle of torch.save."""

    def __init__(self):
        self.storages: dict[str, PickledStorage] = {}

    def storage(self, identifier: Any) -> PickledStorage | InertObject:
        """The storage that a persistent id stands for; an empty object for other things."""
        if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
            return InertObject()
        _, kind, key, _, whole, *view = identifier
        known = isinstance(kind, ForeignName) and kind.module in _STORAGE_MODULES
        if not known or kind.name not in _STORAGES:
            return InertObject(kind if isinstance(kind, ForeignName) else None)
        if not isinstance(key, str) or not _is_count(whole):
            raise TorchFileError("a storage in it has no name or no length")
        start, length = 0, whole
        if view and view[0] is not None:
            _, start, length = view[0]
        if not (_is_count(start) and _is_count(length) and start + length <= whole):
            raise TorchFileError(f"a view of storage {key!r} reaches beyond its end")
        storage = PickledStorage(key, _STORAGES[kind.name], whole, start, length)
        first = self.storages.setdefault(key, storage)
        if (first.dtype, first.whole) != (storage.dtype, storage.whole):
            raise TorchFileError(f"storage {key!r} is described twice, each time otherwise")
        return storage

    def build(self, name: ForeignName, arguments: tuple) -> Any:
        """Data for tensors, parameters and plain containers; an empty object for all else.

        Containers are passed on, not copied, so that no call costs memory.
        """
        if name.module == "torch._utils":
            if name.name in _REBUILDERS:
                return _tensor(arguments, name)
            if name.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return arguments[0]
        if (name.module, name.name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuilt_from_type(arguments, name)
        if (name.module, name.name) == ("torch", "Size"):
            return tuple(arguments[0])
        if name.module in _BUILTINS and name.name in _DICTIONARIES:
            given = arguments[-1] if arguments else None
            return given if isinstance(given, dict) else {}
        if name.module in _BUILTINS and name.name in _LISTS:
            given = arguments[0] if arguments else None
            return given if isinstance(given, (list, tuple)) else []
        return InertObject(name)


def _rebuilt_from_type(arguments: tuple, name: ForeignName) -> Any:
    """A tensor with attributes: (how, its class, the arguments, the attributes)."""
    how, _, inner, _ = arguments
    if isinstance(how, ForeignName) and how.name in _REBUILDERS:
        return _tensor(inner, name)
    return InertObject(how if isinstance(how, ForeignName) else name)


def _tensor(arguments: tuple, name: ForeignName) -> PickledTensor | InertObject:
    """A strided tensor; raises TorchFileError if it leaves its storage or is larger than it."""
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, PickledStorage):
        return InertObject(storage.origin if isinstance(storage, InertObject) else name)
    numbers = (offset, *shape, *stride)
    if not all(_is_count(number) for number in numbers) or len(shape) != len(stride):
        raise TorchFileError("a tensor in it has a size or stride that is no number")
    last = 0
    for count, step in zip(shape, stride, strict=True):
        last += (count - 1) * step
    count = prod(shape)
    if count and offset + last >= storage.length:
        raise TorchFileError(
            f"a tensor in it of the shape {tuple(shape)} reaches beyond its storage of "
            f"{storage.length:,} numbers"
        )
    if count > storage.length:
        raise TorchFileError(
            f"a tensor in it asks for {count:,} numbers of a storage of {storage.length:,}"
        )
    return PickledTensor(storage, offset, tuple(shape), tuple(stride))


def _is_count(value: Any) -> bool:
    """Whether a value is a number of things that can be addressed."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
