"""What travels on a CAT_MODEL wire."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.model_patcher
import torch

from ...cat_core import weights
from ...cat_core.config import Architecture, SemInpainterConfig
from ...cat_core.knowledge import Knowledge
from ...cat_core.models.sem_inpainter import SemInpainterOutput
from ...cat_core.weights.trained_stages import TrainedStage
from . import symbols
from .memory import BATCH, chunks


@dataclass(frozen=True)
class CatModel:
    """The CAT parts of one file, each in a ModelPatcher, or None."""

    name: str
    architecture: Architecture
    sem_inpainter: comfy.model_patcher.ModelPatcher | None = None
    ref_adapter: comfy.model_patcher.ModelPatcher | None = None
    knowledge: Knowledge = field(default_factory=Knowledge)
    trained: Sequence[TrainedStage] = ()  # what the file says of its training

    def __str__(self):
        parts = [part for part in ("sem_inpainter", "ref_adapter") if getattr(self, part)]
        return f"{self.name}: {weights.describe(parts)}"


def require_part(cat_model: CatModel, part: str) -> comfy.model_patcher.ModelPatcher:
    """The part of a CAT model; raises ValueError if it has none."""
    patcher = getattr(cat_model, part)
    if patcher is None:
        raise ValueError(
            f"This CAT model has no {weights.TITLES[part]}: {cat_model}. Load a file that has one."
        )
    return patcher


def part_tensors(
    cat_model: CatModel | None, part: str, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Copies of a part's tensors on the CPU; empty where there is no such part."""
    patcher = cat_model and getattr(cat_model, part)
    if not patcher:
        return {}
    copies = {}
    for key, tensor in patcher.model.state_dict().items():
        copies[key] = tensor.detach().to("cpu", dtype, copy=True)
    return copies


def run_sem_inpainter(cat_model: CatModel, patches, image, text, patch_mask) -> SemInpainterOutput:
    """What SemInpainter predicts of a batch of any size.

    Computed where the host wants it, returned where it keeps results. Takes SemInpainter's own
    inputs; one text for all pictures.
    """
    patcher = require_part(cat_model, "sem_inpainter")
    needed = _activations(patcher.model.config, len(patches))
    symbols.load([patcher], needed)
    device = symbols.device_of(patcher)
    outputs = []
    for rows in chunks(len(patches)):
        count = len(patches[rows])
        inputs = (patches[rows], image[rows], text.expand(count, -1), patch_mask[rows])
        output = patcher.model(*(part.to(device) for part in inputs))
        outputs.append(SemInpainterOutput(*(part.to(symbols.results_device()) for part in output)))
    return SemInpainterOutput(*map(torch.cat, zip(*outputs, strict=True)))


def _activations(config: SemInpainterConfig, pictures: int) -> int:
    """Bytes that SemInpainter needs beside its weights: some 8 fp32 tensors of its widest layer."""
    tokens = config.grid_size**2 + 2
    return 8 * min(BATCH, pictures) * tokens * config.intermediate_size * 4
