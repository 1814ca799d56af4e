"""PyTorch pickles, read without running anything in them."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import few
from .checkpoint import WeightsError, check_shape
from .inert_pickle import ForeignName, InertObject, Uses
from .keys import is_of_a_part
from .torch_files import PickledTensor, TorchFile, TorchFileError, open_torch_file

log = logging.getLogger(__name__)

# Modules of data: what they name is read as empty objects without asking. Their old and new names.
_DATA_MODULES = {
    *("argparse", "collections", "pathlib", "pathlib._local", "datetime", "decimal", "fractions"),
    *("uuid", "enum", "typing", "_codecs", "copyreg", "copy_reg", "numpy", "numpy.dtypes"),
    *("numpy.core.multiarray", "numpy._core.multiarray"),
    *("numpy.core.numeric", "numpy._core.numeric"),
    *("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.cuda"),
    "torch.serialization",
    *("torch.nn.parameter", "torch.nn.modules.container"),
}
_DATA_PACKAGES = {"omegaconf"}
_BUILTIN_DATA = {
    *("set", "frozenset", "list", "dict", "tuple", "int", "float", "complex", "bool", "str"),
    *("bytes", "bytearray", "slice", "range", "object", "getattr", "long", "unicode", "xrange"),
}
# Names that only an attack has a use for.
_HOSTILE_MODULES = {
    *("os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "importlib", "ctypes"),
    *("pty", "code", "pickle", "_pickle", "webbrowser", "commands", "multiprocessing", "threading"),
}
_BUILTIN_MODULES = ("builtins", "__builtin__")

# Where programs put the state dict beside other things: Lightning, and training scripts.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_MOST_WRAPPERS = 3  # inside one another


@dataclass(frozen=True)
class PickledWeights:
    """The tensors of a checkpoint, by name, and the file that their numbers are in."""

    file: TorchFile
    tensors: Mapping[str, PickledTensor]

    def described(self) -> dict[str, torch.Tensor]:
        """Shapes and types of all tensors, on the meta device."""
        return {name: tensor.described() for name, tensor in self.tensors.items()}

    def load(self, names: Mapping[str, str], mapped: bool) -> dict[str, torch.Tensor]:
        """The tensors whose names are the values of `names`; raises OSError."""
        wanted = {name: self.tensors[name] for name in names.values()}
        return self.file.tensors(wanted, mapped)


def open_pickle(path: Path, inert_objects: bool) -> PickledWeights:
    """Find the tensors of a checkpoint, bare or in Lightning's wrapper.

    Plain data beside them, such as numpy's numbers, is read as what it is or as empty objects.

    Args:
        inert_objects: take foreign objects for empty ones instead of raising.
    Raises:
        WeightsError: it has foreign objects, is damaged, or holds no state dict.
    """
    try:
        file = open_torch_file(path)
    except TorchFileError as error:
        raise _unreadable(path, str(error)) from error
    # The machine raises many kinds of errors for what is broken.
    except Exception as error:
        raise _unreadable(path, "it is damaged or cut short") from error
    hostile = [str(name) for name in file.names if _is_hostile(name)]
    foreign = [str(name) for name, uses in file.names.items() if not _is_data(name, uses)]
    if foreign and not inert_objects:
        raise _refusal(path, foreign)
    if hostile:
        raise _unreadable(path, f"it holds what no weights need and attacks do ({few(hostile)})")
    if foreign:
        log.info("%s: left out Python objects besides tensors: %s.", path.name, few(foreign))
    tensors = _tensors(file.content, path.name)
    _check_total(tensors, file)
    return PickledWeights(file, tensors)


def _is_data(name: ForeignName, uses: Uses) -> bool:
    """Whether a name is one of plain data, or of an enum by the way it is used."""
    if name.module in _BUILTIN_MODULES:
        return name.name in _BUILTIN_DATA
    package = name.module.partition(".")[0]
    if name.module in _DATA_MODULES or package in _DATA_PACKAGES:
        return True
    class_like = name.name.rpartition(".")[2][:1].isupper()
    return class_like and package not in sys.stdlib_module_names and uses.is_like_an_enum


def _is_hostile(name: ForeignName) -> bool:
    if name.module in _BUILTIN_MODULES:
        return name.name in ("eval", "exec", "compile", "open", "__import__", "breakpoint")
    return name.module.partition(".")[0] in _HOSTILE_MODULES


def _refusal(path: Path, foreign: list[str]) -> WeightsError:
    return WeightsError(
        f"{path.name} is a pickle with Python objects besides tensors ({few(foreign)}), which "
        "could run code; nothing was run. To take only its tensors, run the pack's converter with "
        f'ComfyUI\'s Python: tools/convert.py "{path}" --inert-objects '
        f'--full "{path.with_suffix(".safetensors")}"'
    )


def _unreadable(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"{path.name} cannot be read as a PyTorch checkpoint: {reason}; "
        "nothing in it was run. Get it again, or ask for it as safetensors."
    )


def _tensors(content: Any, name: str) -> dict[str, PickledTensor]:
    """The state dict of what was saved.

    Raises WeightsError if there is none, or if a part's key holds something else than a tensor.
    """
    for _ in range(_MOST_WRAPPERS):
        inside = _wrapped(content)
        if inside is None:
            break
        content = inside
    if not isinstance(content, dict):
        raise WeightsError(
            f"{name} is {_kind_of(content)}, expected a state dict of tensors. "
            "Save the model's state_dict(), or ask for it."
        )
    tensors = {}
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, PickledTensor):
            tensors[key] = value
        elif is_of_a_part(key):
            raise WeightsError(
                f"{key} in {name} is {_kind_of(value)}, expected a dense tensor. "
                "Save it as one, or use another file."
            )
    return tensors


def _wrapped(content: Any) -> dict | None:
    """The dictionary under the first of the wrappers' names that is there."""
    if isinstance(content, dict):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), dict):
                return content[wrapper]
    return None


def _kind_of(value: Any) -> str:
    """What a value is, for messages; never what is in it."""
    if isinstance(value, InertObject):
        return f"an object of {value.origin}" if value.origin else "an object of another program"
    if isinstance(value, ForeignName):
        return f"the name {value}"
    if isinstance(value, PickledTensor):
        return "one tensor"
    return f"of the type {type(value).__name__}"


def _check_total(tensors: Mapping[str, PickledTensor], file: TorchFile) -> None:
    """Raise WeightsError if a tensor is too large, or all ask for more than twice the file.

    Some are stored once and used twice; many are an attack on the memory.
    """
    for key, tensor in tensors.items():
        check_shape(tensor.shape, key, file.path.name)
    total = sum(tensor.size for tensor in tensors.values())
    if total > 2 * file.size:
        raise WeightsError(
            f"{file.path.name} has {file.size:,} bytes and its tensors ask for {total:,}. "
            "Expected each number to be stored; get the file again."
        )
