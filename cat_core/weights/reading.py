"""Read official CAT-Diffusion checkpoints, CAT weights files and ordinary inpainting checkpoints.

Every reader returns the same thing, a Checkpoint of named parts. Loading is strict and never runs
code.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path

import safetensors
import torch

from ..config import (
    Architecture,
    ArchitectureError,
    RefAdapterConfig,
    SemInpainterConfig,
    Tensors,
)
from ..errors import few, quoted
from .checkpoint import Checkpoint, WeightsError, cat_modules, check_keys, check_shape
from .keys import DTYPES, TITLES, left_over, sort_keys
from .pickles import open_pickle
from .writing import FORMAT, FORMAT_VERSION

Reader = Callable[[str], tuple[Tensors, Mapping[str, str] | None]]

_CONFIGS = {"sem_inpainter": SemInpainterConfig, "ref_adapter": RefAdapterConfig}
_HEADER_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors format allows no more
_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip, protocols
# How files begin that are downloaded or linked in the place of weights.
_OTHER_FILES = (
    (
        (b"version https://git-lfs",),
        "a pointer of Git LFS, which stands for the weights. Run git lfs pull where it is from, or "
        "download the file itself",
    ),
    ((b"<",), "a web page or XML. Download the file itself"),
    ((b"{", b"["), "JSON text. Choose the file of the weights beside it"),
    ((b"GGUF",), "a GGUF file, expected safetensors or a PyTorch checkpoint"),
    ((b"\x89HDF",), "an HDF5 file, expected safetensors or a PyTorch checkpoint"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"), "a picture. Choose the file of the weights"),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"BZh"), "an archive. Unpack it first"),
)

log = logging.getLogger(__name__)


def read(
    path: str | os.PathLike,
    reader: Reader | None = None,
    mapped: bool = True,
    inert_objects: bool = False,
    numbers: bool = True,
) -> Checkpoint:
    """Read any file this module knows, check it and sort it into parts.

    A mapped file is mapped once a part, when the part is wanted, so that its pages are in memory
    only while it is built.

    Args:
        path: `.safetensors`, or a PyTorch pickle (`.ckpt`, `.pt`, `.pth`, `.bin`), bare or
            Lightning's.
        reader: a host's own reader of safetensors, path -> (tensors, metadata).
        mapped: whether the reader maps the file; False if it copies.
        inert_objects: read a pickle with foreign objects by putting empty placeholders in their
            place. Nothing named in the file is imported or called either way.
        numbers: look for NaN and Inf now; False if each part's Checkpoint.checked will.
    Raises:
        WeightsError: missing, empty, truncated, mislabelled, with code in it, with unknown,
            missing or misshapen keys, with NaN or Inf, or of another kind altogether.
    """
    path = Path(path)
    if _kind(path) == "safetensors":
        file = _read_safetensors(path, reader, mapped)
    else:
        file = _read_pickle(path, inert_objects, mapped)
    if numbers:
        for part in file.parts:
            file.checked(part)
    return file


def parts_inside(path: str | os.PathLike) -> set[str]:
    """Which parts a safetensors file holds, by its header alone.

    The empty set where it is damaged or holds other things, too.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            parts, unknown = sort_keys(dict.fromkeys(file.keys()))
    except (safetensors.SafetensorError, OSError):
        return set()
    return set() if unknown else set(parts)


def load_safetensors(
    path: str, keys: Iterable[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """Tensors, all or those of `keys`, memory-mapped, and the header's metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        wanted = file.keys() if keys is None else keys
        tensors = {key: file.get_tensor(key) for key in wanted}
        return tensors, file.metadata()


# Two kinds of files -------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """ "safetensors" or "pickle", by content; a name that says otherwise is an error."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist or is not a file.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(
            f"{path.name} cannot be opened ({error.strerror}). Check its permissions."
        ) from error
    if not start:
        raise WeightsError(f"{path.name} is empty (0 bytes). Download or copy it again.")
    # Safetensors start with the length of their header, 8 bytes, and the header, a JSON object.
    header_size = int.from_bytes(start[:8], "little")
    if start[:2] in _PICKLE_STARTS:
        kind = "pickle"
    elif start[8:9] == b"{":
        kind = "safetensors"
        if header_size > _LONGEST_HEADER:
            raise WeightsError(
                f"{path.name} says that its header has {header_size:,} bytes, and safetensors "
                f"allows {_LONGEST_HEADER:,}. It is damaged; download or copy it again."
            )
    else:
        raise _not_weights(path, start)
    labelled = "safetensors" if path.suffix.lower() in (".safetensors", ".sft") else "pickle"
    if kind != labelled:
        ending = ".safetensors" if kind == "safetensors" else ".ckpt"
        raise WeightsError(
            f"{path.name} is mislabelled: its content is a {kind} file. "
            f"Rename it to end in {ending}."
        )
    return kind


def _not_weights(path: Path, start: bytes) -> WeightsError:
    """What a file is instead; its content is not quoted, as it may be anybody's."""
    for starts, what in _OTHER_FILES:
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(starts):
            return WeightsError(f"{path.name} is not a weights file but {what}.")
    return WeightsError(
        f"{path.name} is not a weights file: it starts like none. "
        "Expected safetensors or a PyTorch checkpoint; download it again."
    )


def _read_safetensors(path: Path, reader: Reader | None, mapped: bool) -> Checkpoint:
    """By the header first: what does not fit is refused before any weight is read."""
    try:
        header, metadata = _header(path)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path.name} is damaged or cut short ({quoted(error)}). Download or copy it again."
        ) from error
    architecture = _validated(_sorted(header, path.name), metadata, path.name)
    names = _names(header)
    parts: dict[str, Tensors] = {}
    if mapped:
        for part, names_of_part in names.items():
            load = partial(_load_safetensors, path, reader, names_of_part.values())
            parts[part] = _MappedPart(path, names_of_part, load)
    else:
        tensors = _load_safetensors(path, reader)
        for part, names_of_part in names.items():
            parts[part] = _renamed(tensors, names_of_part)
    return Checkpoint(path, parts, architecture, metadata)


def _read_pickle(path: Path, inert_objects: bool, mapped: bool) -> Checkpoint:
    """By the pickle first, which says what is where; numbers are read afterwards."""
    file = open_pickle(path, inert_objects)
    described = file.described()
    architecture = _validated(_sorted(described, path.name), {}, path.name)
    parts: dict[str, Tensors] = {}
    for part, names_of_part in _names(described).items():
        load = partial(file.load, names_of_part, mapped)
        parts[part] = _MappedPart(path, names_of_part, load)
    return Checkpoint(path, parts, architecture)


def _header(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of safetensors on the meta device, that is their shapes and types, and the metadata.

    Tensors that hold no weights, such as indices, are read.
    """
    tensors = {}
    with safetensors.safe_open(str(path), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            slice_ = file.get_slice(key)
            check_shape(slice_.get_shape(), key, path.name)
            dtype = _HEADER_DTYPES.get(slice_.get_dtype())
            if dtype is None:
                tensors[key] = file.get_tensor(key)
            else:
                tensors[key] = torch.empty(slice_.get_shape(), dtype=dtype, device="meta")
        return tensors, file.metadata() or {}


def _load_safetensors(
    path: Path, reader: Reader | None, keys: Iterable[str] | None = None
) -> Tensors:
    """By a host's reader, which reads all, or those of `keys`."""
    if reader is not None:
        return reader(str(path))[0]
    return load_safetensors(str(path), keys)[0]


# Parts --------------------------------------------------------------------------------------------


class _MappedPart(Mapping):
    """A part's tensors, in a mapping of the file of their own, made when one of them is wanted.

    Args:
        names: of the tensors in the file, by key.
        load: the file's tensors, at least those of `names`.
    """

    def __init__(self, path: Path, names: Mapping[str, str], load: Callable[[], Tensors]):
        self._path = path
        self._names = names
        self._load = load

    @cached_property
    def _tensors(self) -> Tensors:
        try:
            return _renamed(self._load(), self._names)
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(
                f"{self._path.name} was changed or removed while it was read ({error}). "
                "Load it again."
            ) from error

    def __getitem__(self, key):
        return self._tensors[key]

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def _names(tensors: Tensors) -> dict[str, dict[str, str]]:
    """By part, the name in the file for each key."""
    return sort_keys({name: name for name in tensors})[0]


def _renamed(tensors: Tensors, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a part under its keys; fp64, which nothing here computes in, becomes fp32."""
    renamed = {}
    for key, name in names.items():
        tensor = tensors[name]
        renamed[key] = tensor.float() if tensor.dtype == torch.float64 else tensor
    return renamed


def _sorted(tensors: Tensors, file_name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Parts of a file; raises WeightsError unless all tensors belong to some part."""
    parts, unknown = sort_keys(tensors)
    if not parts:
        raise WeightsError(
            f"{file_name} is not a CAT-Diffusion file: none of its {len(tensors)} tensors belongs "
            "to a SemInpainter, RefAdapter or Stable Diffusion checkpoint "
            f"({few(unknown) or 'it is empty'})."
        )
    if unknown:
        raise WeightsError(
            f"{file_name} has {len(unknown)} keys that are not part of CAT-Diffusion: "
            f"{few(unknown)}. It may belong to another model."
        )
    besides = left_over(tensors)
    if besides:
        log.info("%s: left out %d keys of no part: %s.", file_name, len(besides), few(besides))
    return parts


# What is checked ----------------------------------------------------------------------------------


def _validated(
    parts: Mapping[str, Tensors], metadata: Mapping[str, str], file_name: str
) -> Architecture:
    """The architecture of a file whose tensors are complete and of the right shapes and types."""
    for part, tensors in parts.items():
        _check_types(tensors, file_name, part)
        for key, tensor in tensors.items():
            check_shape(tensor.shape, f"{key} of the {TITLES[part]}", file_name, smallest=1)
    try:
        if metadata.get("format") == FORMAT:
            architecture = _stated_architecture(parts, metadata, file_name)
        else:
            architecture = _seen_architecture(parts)
    except ArchitectureError as error:
        raise WeightsError(
            f"{file_name}: {error}. The file is incomplete or of another model."
        ) from error
    for part, module in cat_modules(architecture, device="meta").items():
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        check_keys(shapes, parts[part], file_name, part)
    return architecture


def _seen_architecture(parts: Mapping[str, Tensors]) -> Architecture:
    """What tensors tell by themselves."""
    seen = {}
    for part, config in _CONFIGS.items():
        if part in parts:
            seen[part] = config.from_tensors(parts[part])
    return Architecture(**seen)


def _stated_architecture(
    parts: Mapping[str, Tensors], metadata: Mapping[str, str], file_name: str
) -> Architecture:
    """What a CAT weights file's header says.

    Raises ArchitectureError where the tensors say otherwise.
    """
    version = metadata.get("format_version", "")
    if not re.fullmatch("[0-9]{1,9}", version) or int(version) > FORMAT_VERSION:
        raise WeightsError(
            f"{file_name} has format version {ascii(version[:20]) if version else 'none'}, "
            f"this pack reads up to {FORMAT_VERSION}. Update the pack."
        )
    stated = Architecture.from_json(metadata.get("architecture", ""))
    for part, config in _CONFIGS.items():
        stated_config = getattr(stated, part)
        seen_config = None
        if part in parts:
            seen_config = config.from_tensors(parts[part], _heads(stated_config))
        if stated_config != seen_config:
            different = _different_fields(config, stated_config, seen_config)
            raise ArchitectureError(
                f"metadata and tensors disagree about the {TITLES[part]} ({few(different)})"
            )
    return stated


def _heads(config: SemInpainterConfig | RefAdapterConfig | None) -> int | None:
    """Attention heads, which no tensor tells; None if the header does not tell either."""
    if isinstance(config, SemInpainterConfig):
        return config.num_attention_heads or None
    if isinstance(config, RefAdapterConfig):
        return config.num_heads or None
    return None


def _different_fields(config: type, stated: object, seen: object) -> list[str]:
    """Names of the fields that differ, all of them where one of the two is None."""
    different = []
    for field in fields(config):
        if getattr(stated, field.name, None) != getattr(seen, field.name, None):
            different.append(field.name)
    return different


def _check_types(tensors: Tensors, file_name: str, part: str) -> None:
    """Raise WeightsError for a tensor that is not in a type of weights."""
    doubles = 0
    for key, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            doubles += 1
        elif tensor.dtype not in DTYPES.values():
            raise WeightsError(
                f"{key} of the {TITLES[part]} in {file_name} is "
                f"{str(tensor.dtype).removeprefix('torch.')}, expected fp32, fp16 or bf16."
            )
    if doubles:
        log.info(
            "%s: %d tensors of the %s are fp64 and are read as fp32.",
            file_name,
            doubles,
            TITLES[part],
        )
