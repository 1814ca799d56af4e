"""Read weight files: official CAT-Diffusion checkpoints, CAT weights files and ordinary inpainting checkpoints.

Every reader returns the same thing, a Checkpoint of named parts. Loading is strict and never runs code.
"""

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import safetensors
import torch

from ..config import Architecture, ArchitectureError, RefAdapterConfig, SemInpainterConfig, Tensors
from .checkpoint import Checkpoint, WeightsError, cat_modules, check_keys
from .keys import DTYPES, TITLES, few, sort_keys
from .pickles import load_pickle
from .writing import FORMAT, FORMAT_VERSION


def read(
    path: str | os.PathLike,
    reader: Callable | None = None,
    mapped: bool = True,
    inert_objects: bool = False,
    numbers: bool = True,
) -> Checkpoint:
    """Read any file this module knows, check it and sort it into parts.

    A mapped file is mapped once a part, when the part is wanted, so that its pages are in memory only while it is built.

    Args:
        path: `.safetensors`, or a PyTorch pickle (`.ckpt`, `.pt`, `.pth`, `.bin`), bare or Lightning's.
        reader: a host's own reader of safetensors, path -> (tensors, metadata).
        mapped: whether the reader maps the file; False if it copies.
        inert_objects: read a pickle with foreign objects by putting empty placeholders in their place.
            Nothing named in the file is imported or called either way.
        numbers: look for NaN and Inf now; False if each part's Checkpoint.checked will.
    Raises:
        WeightsError: missing, empty, truncated, mislabelled, with code in it, with unknown, missing or
            misshapen keys, with NaN or Inf, or of another kind altogether.
    """
    path = Path(path)

    def load(keys=None):
        if kind == "pickle":
            return load_pickle(path, inert_objects)
        return (reader(str(path)) if reader else load_safetensors(str(path), keys))[0]

    kind = _kind(path)
    try:
        tensors, metadata = _header(str(path)) if kind == "safetensors" else (load(), {})
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path.name} is damaged or cut short ({error}). Download or copy it again."
        ) from error
    parts, unknown = sort_keys(tensors)
    if not parts:
        raise WeightsError(
            f"{path.name} is not a CAT-Diffusion file: none of its {len(tensors)} tensors belongs to a "
            f"SemInpainter, RefAdapter or Stable Diffusion checkpoint ({few(unknown) or 'it is empty'})."
        )
    if unknown:
        raise WeightsError(
            f"{path.name} has {len(unknown)} keys that are not part of CAT-Diffusion: {few(unknown)}. "
            "It may belong to another model."
        )
    try:
        architecture = _architecture(parts, metadata or {}, path.name)
    except ArchitectureError as error:
        raise WeightsError(
            f"{path.name}: {error}. The file is incomplete or of another model."
        ) from error
    for part, found in parts.items():
        _check_types(found, path.name, part)
    for part, module in cat_modules(architecture, device="meta").items():
        check_keys(
            {key: value.shape for key, value in module.state_dict().items()},
            parts[part],
            path.name,
            part,
        )
    if kind == "safetensors" or mapped and zipfile.is_zipfile(path):
        names = sort_keys({key: key for key in tensors})[0]
        if mapped:
            parts = {part: _Mapped(path, names[part], load) for part in parts}
        else:
            found = load()
            parts = {
                part: {key: found[name] for key, name in names[part].items()} for part in parts
            }
    file = Checkpoint(path, parts, architecture, metadata or {})
    for part in parts if numbers else ():
        file.checked(part)
    return file


def parts_inside(path: str | os.PathLike) -> set[str]:
    """Which parts a safetensors file holds, by its header alone; none where it is damaged or holds other things, too."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            parts, unknown = sort_keys(dict.fromkeys(file.keys()))
    except (safetensors.SafetensorError, OSError):
        return set()
    return set() if unknown else set(parts)


def _kind(path: Path) -> str:
    """ "safetensors" or "pickle", by content; a name that says otherwise is an error."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist or is not a file.")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise WeightsError(
            f"{path.name} cannot be opened ({error.strerror}). Check its permissions."
        ) from error
    if not head:
        raise WeightsError(f"{path.name} is empty (0 bytes). Download or copy it again.")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        kind = "safetensors"
    elif head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        kind = "pickle"
    else:
        raise WeightsError(
            f"{path.name} is not a weights file: it starts with {head[:24]!r}. "
            "Expected safetensors or a PyTorch checkpoint; download it again."
        )
    labelled = "safetensors" if path.suffix.lower() in (".safetensors", ".sft") else "pickle"
    if kind != labelled:
        raise WeightsError(
            f"{path.name} is mislabelled: its content is a {kind} file. "
            f"Rename it to end in {'.safetensors' if kind == 'safetensors' else '.ckpt'}."
        )
    return kind


def load_safetensors(
    path: str, keys: Iterable[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """Tensors, all or those of `keys`, memory-mapped, and the header's metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {
            key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)
        }, file.metadata()


def _header(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """As `load_safetensors`, but the weights are on the meta device: their shapes and types alone."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with safetensors.safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        return {
            key: torch.empty(found.get_shape(), dtype=types[found.get_dtype()], device="meta")
            if found.get_dtype() in types
            else file.get_tensor(key)
            for key, found in slices.items()
        }, file.metadata()


class _Mapped(Mapping):
    """A part's tensors, in a mapping of the file of their own, made when the first of them is wanted."""

    def __init__(self, path: Path, names: Mapping[str, str], load: Callable):
        self._path, self._names, self._load = path, names, load  # names: key -> name in the file

    @cached_property
    def _tensors(self):
        try:
            found = self._load(self._names.values())
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(
                f"{self._path.name} was changed or removed while it was read ({error}). Load it again."
            ) from error
        return {key: found[name] for key, name in self._names.items()}

    def __getitem__(self, key):
        return self._tensors[key]

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def _architecture(
    parts: Mapping[str, Tensors], metadata: Mapping[str, str], name: str
) -> Architecture:
    if metadata.get("format") == FORMAT:
        version = metadata.get("format_version", "")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise WeightsError(
                f"{name} has format version {version or 'none'}, this pack reads up to "
                f"{FORMAT_VERSION}. Update the pack."
            )
        architecture = Architecture.from_json(metadata.get("architecture", ""))
        for part, config in (
            ("sem_inpainter", SemInpainterConfig),
            ("ref_adapter", RefAdapterConfig),
        ):
            described, heads = getattr(architecture, part), None
            if described is not None:
                heads = getattr(described, "num_attention_heads", None) or getattr(
                    described, "num_heads", None
                )
            found = config.from_tensors(parts[part], heads) if part in parts else None
            if described != found:
                wrong = [
                    field.name
                    for field in fields(config)
                    if getattr(described, field.name, None) != getattr(found, field.name, None)
                ]
                raise ArchitectureError(
                    f"metadata and tensors disagree about the {TITLES[part]} ({few(wrong)})"
                )
        return architecture
    return Architecture(
        SemInpainterConfig.from_tensors(parts["sem_inpainter"])
        if "sem_inpainter" in parts
        else None,
        RefAdapterConfig.from_tensors(parts["ref_adapter"]) if "ref_adapter" in parts else None,
    )


def _check_types(tensors: Tensors, name: str, part: str) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise WeightsError(
                f"{key} of the {TITLES[part]} in {name} is {str(tensor.dtype).removeprefix('torch.')}, "
                "expected fp32, fp16 or bf16."
            )
