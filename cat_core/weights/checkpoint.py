"""What every reader returns: a file's tensors by part, and the modules that they fit into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..config import LARGEST_SIZE, Architecture, Tensors
from ..errors import CatError, few
from ..knowledge import Knowledge
from ..models.ref_adapter import RefAdapter
from ..models.sem_inpainter import SemInpainter
from .keys import TITLES, describe, flat

CAT_PARTS = ("sem_inpainter", "ref_adapter")

# What an Architecture says, and the part that it is about.
_OWNERS = {
    "sem_inpainter": "sem_inpainter",
    "ref_adapter": "ref_adapter",
    "unet_num_heads": "unet",
    "clip_text_num_heads": "clip_text",
    "clip_vision_num_heads": "clip_vision",
}


class WeightsError(CatError):
    """A file that cannot be used; the message names it, says what was found and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by part, each without its prefix, and the architecture they have."""

    path: Path
    parts: Mapping[str, Tensors]
    architecture: Architecture
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    @property
    def knowledge(self) -> Knowledge:
        """What its header says of the things that it was trained on."""
        return Knowledge.of_header(self.metadata)

    def require(self, *parts: str) -> None:
        """Raise WeightsError unless every named part is here."""
        missing = [TITLES[part] for part in parts if part not in self.parts]
        if missing:
            raise WeightsError(
                f"{self.name} holds {describe(self.parts)}, but no {' and no '.join(missing)}. "
                "Choose a file that has it."
            )

    def checked(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part. Reads all of them once.

        Raises WeightsError if one of them contains NaN or Inf.
        """
        tensors = dict(self.parts[part])
        if finite(*tensors.values()):
            return tensors
        key = next(key for key, tensor in tensors.items() if not finite(tensor))
        raise WeightsError(
            f"{key} of the {TITLES[part]} in {self.name} contains NaN or Inf. "
            "The file is damaged or its training diverged; use another."
        )

    def only(self, *parts: str) -> dict[str, Tensors]:
        """The tensors of those of the named parts that are here."""
        return {part: self.parts[part] for part in parts if part in self.parts}

    def without(self, *parts: str) -> "Checkpoint":
        """The rest.

        The file's pages of `parts` leave the memory with the last that holds their tensors.
        """
        rest = {part: tensors for part, tensors in self.parts.items() if part not in parts}
        return replace(self, parts=rest)


def merge(files: Sequence[Checkpoint]) -> Checkpoint:
    """One Checkpoint of everything that the files hold.

    Of parts that several files have, the last one's are taken.
    """
    parts = {}
    facts = {}
    for file in files:
        parts.update(file.parts)
        for fact, owner in _OWNERS.items():
            if owner in file.parts:
                facts[fact] = getattr(file.architecture, fact)
    return Checkpoint(files[0].path, parts, Architecture(**facts), files[0].metadata)


def cat_module(architecture: Architecture, part: str, **kwargs) -> torch.nn.Module:
    """Build a CAT part that `architecture` describes.

    `kwargs` go to the module: ops, attention, device, dtype.
    """
    build = {"sem_inpainter": SemInpainter, "ref_adapter": RefAdapter}[part]
    return build(getattr(architecture, part), **kwargs)


def cat_modules(architecture: Architecture, **kwargs) -> dict[str, torch.nn.Module]:
    """Build all CAT parts that `architecture` describes, as `cat_module`."""
    described = [part for part in CAT_PARTS if getattr(architecture, part) is not None]
    return {part: cat_module(architecture, part, **kwargs) for part in described}


def check_keys(expected: Mapping[str, torch.Size], tensors: Tensors, name: str, part: str) -> None:
    """Raise WeightsError naming every key of `part` that is missing, extra or of another shape."""
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    misshapen = []
    for key, shape in expected.items():
        if key in tensors and tensors[key].shape != shape:
            found = tuple(tensors[key].shape)
            misshapen.append(f"{key} is {found} instead of {tuple(shape)}")
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing: {few(missing)}")
    if unknown:
        faults.append(f"{len(unknown)} unknown: {few(unknown)}")
    if misshapen:
        faults.append(f"{len(misshapen)} of another shape: {few(misshapen)}")
    if faults:
        raise WeightsError(
            f"The {TITLES[part]} in {name} does not fit: {'; '.join(faults)}. "
            f"Expected the {len(expected)} keys of the official layout."
        )


def check_shape(shape: Sequence[int], key: str, file_name: str, smallest: int = 0) -> None:
    """Raise WeightsError for a size that no model of this kind has; `smallest` is the least."""
    if not all(smallest <= size <= LARGEST_SIZE for size in shape):
        raise WeightsError(
            f"{key} in {file_name} has the shape {tuple(shape)}, expected sizes from {smallest} to "
            f"{LARGEST_SIZE:,}. The file is damaged; get it again."
        )


def split(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, Tensors]]:
    """Split a full checkpoint into (an ordinary SD 1.5 inpainting state dict, the CAT parts).

    The first holds U-Net, VAE and text encoder and no key that a stock loader would not know.
    """
    checkpoint.require(*CAT_PARTS, "unet", "vae", "clip_text")
    base = checkpoint.only("unet", "vae", "clip_text")
    return flat(base), checkpoint.only(*CAT_PARTS)


def finite(*tensors: torch.Tensor) -> bool:
    """Whether no tensor holds NaN or Inf: one pass, no copy, as both show in the extremes."""
    extremes = []
    for tensor in tensors:
        if tensor.numel():
            extremes.extend(tensor.aminmax())
    return not extremes or bool(torch.stack(extremes).isfinite().all())
