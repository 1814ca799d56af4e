"""Write weight files: under a temporary name first, with a header that says what they are."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import Architecture, Tensors
from ..files import replacing
from .checkpoint import CAT_PARTS, WeightsError, finite
from .keys import TITLES, describe, flat

FORMAT = "cat-diffusion"
FORMAT_VERSION = 1

# How the safetensors format calls the types.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def header(
    parts: Mapping[str, Tensors], architecture: Architecture, *, licence: str, provenance: str
) -> dict[str, str]:
    """Header of a file that holds `parts`.

    It says what they are, who may use them, and where they come from. Raises WeightsError if a
    part of CAT-Diffusion has no description.
    """
    described: dict[str, Any] = dict.fromkeys(CAT_PARTS)
    inside = [part for part in CAT_PARTS if part in parts]
    for part in inside:
        described[part] = getattr(architecture, part)
        if described[part] is None:
            titles = " and the ".join(TITLES[part] for part in inside)
            raise WeightsError(f"The architecture of the {titles} is not given.")
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "architecture": replace(architecture, **described).to_json(),
        "license": licence,
        "provenance": provenance,
    }


def cat_metadata(
    parts: Mapping[str, Tensors], architecture: Architecture, **facts: str
) -> dict[str, str]:
    """Header of a CAT weights file, see `header`.

    Raises WeightsError if there is nothing of CAT-Diffusion in `parts`.
    """
    if not set(CAT_PARTS) & set(parts):
        raise WeightsError(
            f"Not a CAT weights file: the tensors are {describe(parts)}, expected a SemInpainter "
            "or RefAdapter and its architecture."
        )
    return header(parts, architecture, **facts)


def write_cat_weights(
    path: str | os.PathLike,
    parts: Mapping[str, Tensors],
    architecture: Architecture,
    *,
    licence: str,
    provenance: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a CAT weights file: `parts` under their official prefixes.

    See `cat_metadata` for the header and `save` for the rest.
    """
    metadata = cat_metadata(parts, architecture, licence=licence, provenance=provenance)
    save(path, flat(parts), metadata, dtype, overwrite)


def save(
    path: str | os.PathLike,
    tensors: Tensors,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write safetensors; an older file stays whole until the new one is.

    Args:
        dtype: what the tensors are stored as; as they are without it.
        overwrite: replace an older file at `path`.
    Raises:
        WeightsError: there is a file, numbers do not fit into fp16, or the disk does not take them.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise WeightsError(
            f"{path} exists already and was not touched. Choose another name or allow overwriting."
        )
    try:
        with replacing(path) as partial:
            _write(partial, tensors, metadata, dtype)
    except (OSError, UnicodeError) as error:
        raise WeightsError(
            f"Cannot write {path}: {error}. Check free space and permissions; "
            "no other file was touched."
        ) from error


def _write(
    path: Path, tensors: Tensors, metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Write safetensors one tensor after the other: the memory holds one converted at a time."""
    # As the format's own writer has them: wide numbers first, so that each lies at its multiple.
    keys = sorted(tensors, key=lambda key: (-(dtype or tensors[key].dtype).itemsize, key))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in keys:
        stored_dtype = dtype or tensors[key].dtype
        start = end
        end += tensors[key].numel() * stored_dtype.itemsize
        entries[key] = {
            "dtype": _NAMES[stored_dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            stored = _stored(key, tensors[key], dtype)
            if stored.numel():
                file.write(stored.flatten().view(torch.uint8).numpy().data)


def _stored(key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor as it is written, on the CPU; raises WeightsError for an overflow."""
    stored = tensor.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and not finite(stored):
        raise WeightsError(
            f"{key} does not fit into fp16: it holds numbers beyond 65504 or none at all. Use bf16."
        )
    return stored
