"""Frozen descriptions of every architecture, read from tensors or from a file's metadata."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CatError

Tensors = Mapping[str, torch.Tensor]
Blocks = tuple[tuple[str, int], ...]  # (transformer block of a U-Net, its width C)

HEAD_WIDTH = 64  # CLIP's attention heads, when nothing says otherwise
UNET_HEADS = 8  # in every block of SD 1.5


class ArchitectureError(CatError):
    """Tensors or metadata that do not describe a CAT-Diffusion model."""


@dataclass(frozen=True)
class SemInpainterConfig:
    """The official SemInpainter (`fusion_model`); defaults are the paper's ViT-L/14 size."""

    hidden_size: int = 1024  # D
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    grid_size: int = 16  # G, patches along one side
    text_size: int = 768  # T
    text_intermediate_size: int = 3072
    spatial_intermediate_size: int = 4096
    global_intermediate_size: int = 4096
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_tensors(
        cls, tensors: Tensors, num_attention_heads: int | None = None
    ) -> "SemInpainterConfig":
        """Read every size off the parameters; the head count cannot be seen in them."""
        # encoder.layers.<number>.<parameter>
        layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}
        try:
            positions, hidden_size = tensors["embeddings.position_embedding.weight"].shape
            intermediate_size = tensors["encoder.layers.0.mlp.fc1.weight"].shape[0]
            text_intermediate_size, text_size = tensors["label_mlp.fc1.weight"].shape
            config = cls(
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_hidden_layers=len(layers),
                num_attention_heads=num_attention_heads or max(hidden_size // HEAD_WIDTH, 1),
                grid_size=math.isqrt(positions),
                text_size=text_size,
                text_intermediate_size=text_intermediate_size,
                spatial_intermediate_size=tensors["spatial_mlp.fc1.weight"].shape[0],
                global_intermediate_size=tensors["global_mlp.fc1.weight"].shape[0],
            )
        except KeyError as error:
            raise ArchitectureError(f"the SemInpainter lacks {error.args[0]}") from None
        _check_heads(hidden_size, num_attention_heads)
        return config


@dataclass(frozen=True)
class RefAdapterConfig:
    """The RefAdapters of one U-Net: where they sit and how wide they are."""

    visual_size: int  # D
    num_heads: int
    blocks: Blocks

    @classmethod
    def from_tensors(cls, tensors: Tensors, num_heads: int | None = None) -> "RefAdapterConfig":
        """Read blocks and widths off the parameters; SD 1.5 has 8 heads in every block."""
        blocks = _blocks_with("attn3.to_k.weight", tensors)
        if not blocks:
            raise ArchitectureError("the RefAdapter has no attn3.to_k.weight")
        num_heads = num_heads or UNET_HEADS
        visual_sizes = set()
        for name, width in blocks:
            _check_heads(width, num_heads)
            visual_sizes.add(tensors[f"{name}.attn3.to_k.weight"].shape[1])
        if len(visual_sizes) != 1:
            raise ArchitectureError(
                "the RefAdapter's blocks expect visual prompts of different widths "
                f"{sorted(visual_sizes)}"
            )
        return cls(visual_size=visual_sizes.pop(), num_heads=num_heads, blocks=blocks)


@dataclass(frozen=True)
class Architecture:
    """What a file's tensors cannot tell by themselves, for all parts that the file may hold."""

    sem_inpainter: SemInpainterConfig | None = None
    ref_adapter: RefAdapterConfig | None = None
    unet_num_heads: int = UNET_HEADS
    clip_text_num_heads: int | None = None  # None: width / 64
    clip_vision_num_heads: int | None = None

    def to_json(self) -> str:
        """Text for a safetensors header."""
        facts = dataclasses.asdict(self)
        return json.dumps({name: fact for name, fact in facts.items() if fact is not None})

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """Inverse of `to_json`; raises ArchitectureError on anything else."""
        try:
            return cls(**_described(json.loads(text)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArchitectureError(
                f"the architecture in the metadata cannot be read ({error})"
            ) from None


def unet_blocks(unet: Tensors) -> Blocks:
    """Every transformer block of a U-Net with these tensors, and its width, in natural order."""
    return _blocks_with("norm1.weight", unet)


def _blocks_with(parameter: str, tensors: Tensors) -> Blocks:
    """Name of every block that has such a parameter, and the parameter's first dimension."""
    suffix = f".{parameter}"
    blocks = []
    for key, tensor in tensors.items():
        if key.endswith(suffix):
            blocks.append((key.removesuffix(suffix), tensor.shape[0]))
    return tuple(sorted(blocks, key=_natural_order))


def _natural_order(block: tuple[str, int]) -> list:
    """Sort key that puts input_blocks.10 after input_blocks.9."""
    parts = re.split(r"(\d+)", block[0])
    return [int(part) if part.isdigit() else part for part in parts]


def _check_heads(width: int, heads: int | None) -> None:
    if heads is None:
        return
    if not (isinstance(heads, int) and heads > 0 and width % heads == 0):
        raise ArchitectureError(f"{heads!r} attention heads do not divide a width of {width}")


def _described(facts: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Architecture out of its JSON; raises whatever malformed JSON leads to."""
    if "sem_inpainter" in facts:
        facts["sem_inpainter"] = SemInpainterConfig(**facts["sem_inpainter"])
    if "ref_adapter" in facts:
        adapter = facts["ref_adapter"]
        facts["ref_adapter"] = RefAdapterConfig(
            visual_size=adapter["visual_size"],
            num_heads=adapter["num_heads"],
            blocks=tuple((str(name), int(width)) for name, width in adapter["blocks"]),
        )
    for name in ("unet_num_heads", "clip_text_num_heads", "clip_vision_num_heads"):
        heads = facts.get(name, 1)
        if not isinstance(heads, int) or heads < 1:
            raise ArchitectureError(f"{name} is {heads!r}, expected a positive number")
    return facts
