"""PyTorch pickles, read without running anything in them."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from .checkpoint import WeightsError
from .keys import few


class _Inert:
    """Stands for a foreign class: whatever it is called with, an empty dict comes out (torch fills only dicts)."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def load_pickle(path: Path, inert_objects: bool) -> dict[str, torch.Tensor]:
    zipped, foreign = zipfile.is_zipfile(path), []
    try:
        if zipped and hasattr(
            torch.serialization, "get_unsafe_globals_in_checkpoint"
        ):  # PyTorch 2.6
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign and not inert_objects:
            raise WeightsError(
                f"{path.name} is a pickle with Python objects besides tensors ({few(foreign)}), which "
                "could run code; nothing was run. To take only its tensors, run the pack's converter with "
                f'ComfyUI\'s Python: tools/convert.py "{path}" --inert-objects '
                f'--full "{path.with_suffix(".safetensors")}"'
            )
        placeholders = [(type("Inert", (_Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except WeightsError:
        raise
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for what is broken
        reason = "it is damaged or cut short"
        if foreign:
            reason = f"it holds objects that no setting makes safe ({few(foreign)})"
        elif isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            reason = "it holds Python objects besides tensors, in a form that only its own program can read"
        raise WeightsError(
            f"{path.name} cannot be read as a PyTorch checkpoint: {reason}; nothing in it was run. "
            "Get it again, or ask for it as safetensors."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # Lightning's wrapper
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path.name} holds a {type(content).__name__}, expected a state dict of tensors."
        )
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
