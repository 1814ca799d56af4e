"""What every reader returns: a file's tensors by part, and the modules that they fit into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..config import Architecture, Tensors
from ..errors import CatError
from ..models.ref_adapter import RefAdapter
from ..models.sem_inpainter import SemInpainter
from .keys import TITLES, describe, few, flat


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

    def require(self, *parts: str) -> None:
        """Raise WeightsError unless every named part is here."""
        missing = [TITLES[part] for part in parts if part not in self.parts]
        if missing:
            raise WeightsError(
                f"{self.name} holds {describe(self.parts)}, but no {' and no '.join(missing)}. "
                "Choose a file that has it."
            )

    def checked(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part; WeightsError if one of them contains NaN or Inf. Reads all of them once."""
        tensors = dict(self.parts[part])
        if not finite(*tensors.values()):
            key = next(key for key, tensor in tensors.items() if not finite(tensor))
            raise WeightsError(
                f"{key} of the {TITLES[part]} in {self.name} contains NaN or Inf. "
                "The file is damaged or its training diverged; use another."
            )
        return tensors

    def without(self, *parts: str) -> "Checkpoint":
        """The rest; the file's pages of `parts` leave the memory with the last that holds their tensors."""
        return replace(
            self, parts={part: tensors for part, tensors in self.parts.items() if part not in parts}
        )


def merge(files: Sequence[Checkpoint]) -> Checkpoint:
    """One Checkpoint of everything that the files hold; of parts that several have, the last one's."""
    parts = {part: tensors for file in files for part, tensors in file.parts.items()}
    facts = {}
    for file in files:
        for name, owner in (
            ("sem_inpainter", "sem_inpainter"),
            ("ref_adapter", "ref_adapter"),
            ("unet_num_heads", "unet"),
            ("clip_text_num_heads", "clip_text"),
            ("clip_vision_num_heads", "clip_vision"),
        ):
            if owner in file.parts:
                facts[name] = getattr(file.architecture, name)
    return Checkpoint(files[0].path, parts, Architecture(**facts), files[0].metadata)


def cat_module(architecture: Architecture, part: str, **kwargs) -> torch.nn.Module:
    """Build a CAT part that `architecture` describes; `kwargs` go to the module (ops, attention, device, dtype)."""
    build = {"sem_inpainter": SemInpainter, "ref_adapter": RefAdapter}[part]
    return build(getattr(architecture, part), **kwargs)


def cat_modules(architecture: Architecture, **kwargs) -> dict[str, torch.nn.Module]:
    """Build all CAT parts that `architecture` describes, as `cat_module`."""
    return {
        part: cat_module(architecture, part, **kwargs)
        for part in ("sem_inpainter", "ref_adapter")
        if getattr(architecture, part) is not None
    }


def check_keys(expected: Mapping[str, torch.Size], tensors: Tensors, name: str, part: str) -> None:
    """Raise WeightsError naming every key of `part` that is missing, extra or of another shape."""
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if missing or extra or shapes:
        found = [
            f"{len(keys)} {what}: {few(keys)}"
            for what, keys in (
                ("missing", missing),
                ("unknown", extra),
                ("of another shape", shapes),
            )
            if keys
        ]
        raise WeightsError(
            f"The {TITLES[part]} in {name} does not fit: {'; '.join(found)}. "
            f"Expected the {len(expected)} keys of the official layout."
        )


def split(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, Tensors]]:
    """Split a full checkpoint into (an ordinary SD 1.5 inpainting state dict, the CAT parts).

    The first holds U-Net, VAE and text encoder and no key that a stock loader would not know.
    """
    checkpoint.require("sem_inpainter", "ref_adapter", "unet", "vae", "clip_text")
    base = flat({part: checkpoint.parts[part] for part in ("unet", "vae", "clip_text")})
    return base, {part: checkpoint.parts[part] for part in ("sem_inpainter", "ref_adapter")}


def finite(*tensors: torch.Tensor) -> bool:
    """One pass, no copy: NaN and Inf show in the extremes."""
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in tensor.aminmax()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())
