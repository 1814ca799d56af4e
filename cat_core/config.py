"""Frozen descriptions of every architecture, read from tensors or from a file's metadata."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import CatError

Tensors = Mapping[str, torch.Tensor]

HEAD_WIDTH = 64  # CLIP's attention heads, when nothing says otherwise


class ArchitectureError(CatError):
    """Tensors or metadata that do not describe a CAT-Diffusion model."""


def _check_heads(width: int, heads: int | None) -> None:
    if heads is not None and not (isinstance(heads, int) and heads > 0 and width % heads == 0):
        raise ArchitectureError(f"{heads!r} attention heads do not divide a width of {width}")


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
        try:
            positions, hidden = tensors["embeddings.position_embedding.weight"].shape
            intermediate = tensors["encoder.layers.0.mlp.fc1.weight"].shape[0]
            text_intermediate, text = tensors["label_mlp.fc1.weight"].shape
            spatial_intermediate = tensors["spatial_mlp.fc1.weight"].shape[0]
            global_intermediate = tensors["global_mlp.fc1.weight"].shape[0]
        except KeyError as error:
            raise ArchitectureError(f"the SemInpainter lacks {error.args[0]}") from None
        layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}
        _check_heads(hidden, num_attention_heads)
        return cls(
            hidden,
            intermediate,
            len(layers),
            num_attention_heads or max(hidden // HEAD_WIDTH, 1),
            math.isqrt(positions),
            text,
            text_intermediate,
            spatial_intermediate,
            global_intermediate,
        )


@dataclass(frozen=True)
class RefAdapterConfig:
    """The RefAdapters of one U-Net: where they sit and how wide they are."""

    visual_size: int  # D
    num_heads: int
    blocks: tuple[tuple[str, int], ...]  # (transformer block of the U-Net, its width C)

    @classmethod
    def from_tensors(cls, tensors: Tensors, num_heads: int | None = None) -> "RefAdapterConfig":
        """Read blocks and widths off the parameters; SD 1.5 has 8 heads in every block."""
        keys = [key for key in tensors if key.endswith(".attn3.to_k.weight")]
        if not keys:
            raise ArchitectureError("the RefAdapter has no attn3.to_k.weight")
        blocks = [(key.removesuffix(".attn3.to_k.weight"), tensors[key].shape[0]) for key in keys]
        visual = {tensors[key].shape[1] for key in keys}
        for _, width in blocks:
            _check_heads(width, num_heads or 8)
        if len(visual) != 1:
            raise ArchitectureError(
                f"the RefAdapter's blocks expect visual prompts of different widths {sorted(visual)}"
            )
        return cls(visual.pop(), num_heads or 8, tuple(sorted(blocks, key=block_order)))


@dataclass(frozen=True)
class Architecture:
    """What a file's tensors cannot tell by themselves, for all parts that the file may hold."""

    sem_inpainter: SemInpainterConfig | None = None
    ref_adapter: RefAdapterConfig | None = None
    unet_num_heads: int = 8
    clip_text_num_heads: int | None = None  # None: width / 64
    clip_vision_num_heads: int | None = None

    def to_json(self) -> str:
        """Text for a safetensors header."""
        return json.dumps(
            {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        )

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """Inverse of `to_json`; raises ArchitectureError on anything else."""
        try:
            fields = json.loads(text)
            if "sem_inpainter" in fields:
                fields["sem_inpainter"] = SemInpainterConfig(**fields["sem_inpainter"])
            if "ref_adapter" in fields:
                adapter = fields["ref_adapter"]
                blocks = tuple((str(name), int(width)) for name, width in adapter["blocks"])
                fields["ref_adapter"] = RefAdapterConfig(
                    adapter["visual_size"], adapter["num_heads"], blocks
                )
            for name in ("unet_num_heads", "clip_text_num_heads", "clip_vision_num_heads"):
                if not isinstance(fields.get(name, 1), int) or fields.get(name, 1) < 1:
                    raise ArchitectureError(
                        f"{name} is {fields[name]!r}, expected a positive number"
                    )
            return cls(**fields)
        except ArchitectureError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArchitectureError(
                f"the architecture in the metadata cannot be read ({error})"
            ) from None


def block_order(block: tuple[str, int]) -> list:
    """Sort key that puts input_blocks.10 after input_blocks.9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", block[0])]
