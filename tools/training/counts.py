"""What a step of a stage takes, counted on tensors without content: operations and bytes."""

import dataclasses
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.config import Tensors
from cat_diffusion.cat_core.training.objectives import Batch, combine
from cat_diffusion.cat_core.training.settings import Settings
from cat_diffusion.cat_core.training.stages import Stage
from cat_diffusion.cat_core.weights import Checkpoint

from . import stage_parts

PATCHES = 256  # of CLIP, whose pictures have 224 pixels and patches 14
TOKENS = 77  # of a text
CELL = 8  # pixels along one side of a latent cell
FP32 = 4  # bytes
HALF = 2
MOMENTS = 8  # bytes a parameter of AdamW's two moments in fp32
MOMENTS_8BIT = 2


@dataclass(frozen=True)
class StageCounts:
    """Operations and bytes of one stage, by count."""

    flop: float  # of a sample in a step, with the backward pass
    trained: int  # parameters
    frozen: int  # parameters that lie beside them, in fp32 as well
    encoders: int  # bytes of the frozen networks that encode samples
    step: float  # bytes of activations and gradients at their peak, as if all were fp32

    def memory(self, settings: Settings, encoders: bool) -> float:
        """Bytes at a step's peak, without what PyTorch takes for itself.

        An upper bound for half precision, as all activations count as fp32.

        Args:
            encoders: whether the frozen networks stay, as they do without a cache.
        """
        kept = self.checkpoint(settings) + self.frozen * FP32
        halves = 0 if settings.precision == "no" else (self.trained + self.frozen) * HALF
        return kept + halves + self.step + (self.encoders if encoders else 0)

    def checkpoint(self, settings: Settings) -> float:
        """Bytes of a checkpoint: weights, AdamW's moments, moving average."""
        moments = MOMENTS_8BIT if settings.use_8bit_adam else MOMENTS
        average = FP32 if settings.ema_decay else 0
        return self.trained * (FP32 + moments + average)


def counted(
    stage: Stage,
    file: Checkpoint,
    micro_batch_size: int,
    *,
    size: int = 512,
    masked: bool = False,
    checkpointing: bool = False,
    lora_rank: int = stage_parts.LORA_RANK,
) -> StageCounts:
    """Count a stage that starts from a file; of its tensors only the shapes are looked at.

    Args:
        micro_batch_size: samples that go through the model at once.
        size: side of the pictures for the VAE, in pixels.
    """

    def build() -> nn.Module:
        empty = dataclasses.replace(file, parts=_shapes(file))
        built, objective = stage_parts.build(
            stage, empty, masked=masked, checkpointing=checkpointing, lora_rank=lora_rank
        )
        for part, module in built.items():
            module.requires_grad_(part in stage.parts)
        return objective

    with torch.device("meta"):
        objective = build()
        batch = _batch(file, 1, size)
        with FlopCounterMode(display=False) as counter:
            _step(objective, batch)
    with FakeTensorMode():
        objective = build()
        batch = _batch(file, micro_batch_size, size)
        kept = [*objective.parameters(), *objective.buffers(), *batch.values()]
        with _LiveBytes(kept) as live:
            _step(objective, batch)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return StageCounts(
        flop=float(counter.get_total_flops()),
        trained=trained,
        frozen=sum(p.numel() for p in objective.parameters()) - trained,
        encoders=_bytes(file, stage_parts.frozen_parts(stage.objective)),
        step=live.peak,
    )


class _LiveBytes(TorchDispatchMode):
    """Follows how many bytes of tensors are alive, and how many at most.

    Args:
        kept: tensors that do not count.
    """

    def __init__(self, kept):
        super().__init__()
        self.alive = 0
        self.peak = 0
        self.known = weakref.WeakKeyDictionary()
        for tensor in kept:
            self.known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                self._see(result.untyped_storage())
        return results

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.alive -= size


def _step(objective: nn.Module, batch: Batch) -> None:
    """Forward and backward pass of a batch."""
    judged: Any = objective
    terms, _ = judged(batch)
    totals = {name: torch.ones(()) for name in terms}
    combine(judged, terms, totals).backward()


def _shapes(file: Checkpoint) -> dict[str, Tensors]:
    """The tensors of all parts without content, those that the file lacks too."""
    parts: dict[str, Tensors] = {}
    for part, module in weights.cat_modules(file.architecture).items():
        parts[part] = module.state_dict()
    for part, tensors in file.parts.items():
        if part not in parts:
            parts[part] = {key: torch.empty(tensor.shape) for key, tensor in tensors.items()}
    return parts


def _batch(file: Checkpoint, count: int, size: int) -> Batch:
    """Samples as the objectives read them, without content, on the device that is set."""
    width = file.parts["clip_vision"]["vision_model.post_layernorm.weight"].shape[0]
    text_width = file.parts["clip_text"]["text_model.final_layer_norm.weight"].shape[0]
    grid = int(PATCHES**0.5)
    cells = size // CELL
    patches = torch.zeros(count, PATCHES, width)
    image = torch.zeros(count, width)
    latent = torch.zeros(count, 4, cells, cells)
    return {
        "patches": patches,
        "teacher_patches": patches.clone(),
        "image": image,
        "teacher_image": image.clone(),
        "text": torch.zeros(count, text_width),
        "patch_mask": torch.zeros(count, 1, grid, grid, dtype=torch.bool),
        "latent": latent,
        "masked_latent": latent.clone(),
        "noise": latent.clone(),
        "latent_mask": torch.zeros(count, 1, cells, cells),
        "timestep": torch.zeros(count, dtype=torch.int64),
        "context": torch.zeros(count, TOKENS, text_width),
        "dropped": torch.zeros(count, dtype=torch.bool),
    }


def _bytes(file: Checkpoint, parts: list[str]) -> int:
    """The bytes of parts as their file has them."""
    total = 0
    for part in parts:
        for tensor in file.parts.get(part, {}).values():
            total += tensor.numel() * tensor.element_size()
    return total
