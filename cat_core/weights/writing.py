"""Write weight files: under a temporary name first, with a header that says what they are."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ..config import Architecture, Tensors
from .checkpoint import WeightsError, finite
from .keys import TITLES, describe, flat

FORMAT = "cat-diffusion"
FORMAT_VERSION = 1


def header(
    parts: Mapping[str, Tensors], architecture: Architecture, *, licence: str, provenance: str
) -> dict[str, str]:
    """Header of a file that holds `parts`: what they are, who may use them, and where they come from.

    Raises WeightsError if a part of CAT-Diffusion has no description.
    """
    described = {
        part: getattr(architecture, part)
        for part in ("sem_inpainter", "ref_adapter")
        if part in parts
    }
    if None in described.values():
        raise WeightsError(
            f"The architecture of the {' and the '.join(TITLES[part] for part in described)} is not given."
        )
    architecture = replace(
        architecture, **{"sem_inpainter": None, "ref_adapter": None, **described}
    )
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "architecture": architecture.to_json(),
        "license": licence,
        "provenance": provenance,
    }


def cat_metadata(
    parts: Mapping[str, Tensors], architecture: Architecture, **facts: str
) -> dict[str, str]:
    """Header of a CAT weights file, see `header`; raises WeightsError if there is nothing of CAT-Diffusion in `parts`."""
    if not {"sem_inpainter", "ref_adapter"} & set(parts):
        raise WeightsError(
            f"Not a CAT weights file: the tensors are {describe(parts)}, expected a SemInpainter or "
            "RefAdapter and its architecture."
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
    """Write a CAT weights file: `parts` under their official prefixes, see `cat_metadata` and `save`."""
    save(
        path,
        flat(parts),
        cat_metadata(parts, architecture, licence=licence, provenance=provenance),
        dtype,
        overwrite,
    )


def save(
    path: str | os.PathLike,
    tensors: Tensors,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write safetensors to a temporary name beside `path`, then rename it; an old file stays whole until then."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise WeightsError(
            f"{path} exists already and was not touched. Choose another name or allow overwriting."
        )
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()
        }
        for key, tensor in tensors.items():
            if dtype == torch.float16 and not finite(tensor):
                raise WeightsError(
                    f"{key} does not fit into fp16: it holds numbers beyond 65504 or none at all. Use bf16."
                )
        safetensors.torch.save_file(tensors, partial, metadata=dict(metadata))
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # safetensors makes its files private
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"Cannot write {path}: {error}. Check free space and permissions; "
            "no other file was touched."
        ) from error
    finally:
        if partial.exists():
            partial.unlink()
