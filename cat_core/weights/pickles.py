"""PyTorch pickles, read without running anything in them."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from ..errors import few
from .checkpoint import WeightsError


class _Inert:
    """Stands for a foreign class: whatever it is called with, an empty dict comes out.

    PyTorch's unpickler fills nothing else.
    """

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def load_pickle(path: Path, inert_objects: bool) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, bare or in Lightning's wrapper; memory-mapped if it is a zip.

    Args:
        inert_objects: put placeholders in the place of foreign objects instead of raising.
    Raises:
        WeightsError: it has foreign objects, is damaged, or holds no state dict.
    """
    foreign: list[str] = []
    try:
        foreign = _foreign_objects(path)
        if foreign and not inert_objects:
            raise _refusal(path, foreign)
        with torch.serialization.safe_globals(_placeholders(foreign)):
            content = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),
            )
    except WeightsError:
        raise
    # PyTorch raises RuntimeError, UnpicklingError, EOFError and others for what is broken.
    except Exception as error:
        raise WeightsError(
            f"{path.name} cannot be read as a PyTorch checkpoint: {_reason(error, foreign)}; "
            "nothing in it was run. Get it again, or ask for it as safetensors."
        ) from error
    return _state_dict(content, path.name)


def _foreign_objects(path: Path) -> list[str]:
    """Classes and functions that a pickle names and PyTorch does not know; none is imported.

    PyTorch can list them from 2.6 on, and only of zipped files.
    """
    can_list = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    if not can_list or not zipfile.is_zipfile(path):
        return []
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def _placeholders(foreign: list[str]) -> list:
    """A class of its own for every name, as PyTorch wants them."""
    return [(type("Inert", (_Inert,), {}), name) for name in foreign]


def _refusal(path: Path, foreign: list[str]) -> WeightsError:
    return WeightsError(
        f"{path.name} is a pickle with Python objects besides tensors ({few(foreign)}), which "
        "could run code; nothing was run. To take only its tensors, run the pack's converter with "
        f'ComfyUI\'s Python: tools/convert.py "{path}" --inert-objects '
        f'--full "{path.with_suffix(".safetensors")}"'
    )


def _reason(error: Exception, foreign: list[str]) -> str:
    """Why PyTorch could not read a file, for people."""
    if foreign:
        return f"it holds objects that no setting makes safe ({few(foreign)})"
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
        return (
            "it holds Python objects besides tensors, in a form that only its own program can read"
        )
    return "it is damaged or cut short"


def _state_dict(content: object, name: str) -> dict[str, torch.Tensor]:
    """The tensors of what was unpickled."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # Lightning's wrapper
    if not isinstance(content, dict):
        raise WeightsError(
            f"{name} holds a {type(content).__name__}, expected a state dict of tensors."
        )
    tensors = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value
    return tensors
