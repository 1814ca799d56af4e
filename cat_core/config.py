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
LARGEST_SIZE = (
    1 << 20
)  # of any dimension; SD 1.5's largest is the text encoder's vocabulary, 49,408
_LONGEST_JSON = 1_000_000  # letters; SD 1.5's architecture takes 1,500


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
            positions, hidden_size = sizes(tensors, "embeddings.position_embedding.weight", 2)
            text_intermediate_size, text_size = sizes(tensors, "label_mlp.fc1.weight", 2)
            config = cls(
                hidden_size=hidden_size,
                intermediate_size=sizes(tensors, "encoder.layers.0.mlp.fc1.weight", 2)[0],
                num_hidden_layers=len(layers),
                num_attention_heads=num_attention_heads or heads_of(hidden_size),
                grid_size=math.isqrt(positions),
                text_size=text_size,
                text_intermediate_size=text_intermediate_size,
                spatial_intermediate_size=sizes(tensors, "spatial_mlp.fc1.weight", 2)[0],
                global_intermediate_size=sizes(tensors, "global_mlp.fc1.weight", 2)[0],
            )
        except KeyError as error:
            raise ArchitectureError(f"the SemInpainter lacks {error.args[0]}") from None
        check_heads(hidden_size, config.num_attention_heads)
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
        blocks = _blocks_with("attn3.to_k.weight", tensors, rank=2)
        if not blocks:
            raise ArchitectureError("the RefAdapter has no attn3.to_k.weight")
        num_heads = num_heads or UNET_HEADS
        visual_sizes = set()
        for name, width in blocks:
            check_heads(width, num_heads)
            visual_sizes.add(sizes(tensors, f"{name}.attn3.to_k.weight", 2)[1])
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
        if len(text) > _LONGEST_JSON:
            raise ArchitectureError(
                f"the architecture in the metadata has {len(text):,} letters, "
                f"expected at most {_LONGEST_JSON:,}"
            )
        try:
            facts = json.loads(text)
            if not isinstance(facts, dict):
                raise TypeError("it is no object")
            return cls(**_described(facts))
        except RecursionError:
            raise ArchitectureError(
                "the architecture in the metadata cannot be read (it is nested too deeply)"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArchitectureError(
                f"the architecture in the metadata cannot be read ({_short(str(error))})"
            ) from None


def sizes(tensors: Tensors, key: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that has `rank` dimensions.

    Raises KeyError if there is none of that name, ArchitectureError if it has another rank.
    """
    shape = tuple(tensors[key].shape)
    if len(shape) != rank:
        raise ArchitectureError(f"{key} has the shape {shape}, expected {rank} dimensions")
    return shape


def heads_of(width: int) -> int:
    """CLIP's number of attention heads for a width."""
    return max(width // HEAD_WIDTH, 1)


def check_heads(width: int, heads: int) -> None:
    """Raise ArchitectureError unless so many attention heads share a width evenly."""
    if heads < 1 or width % heads:
        raise ArchitectureError(f"{heads} attention heads do not divide a width of {width}")


def unet_blocks(unet: Tensors) -> Blocks:
    """Every transformer block of a U-Net with these tensors, and its width, in natural order."""
    return _blocks_with("norm1.weight", unet, rank=1)


def _blocks_with(parameter: str, tensors: Tensors, rank: int) -> Blocks:
    """Name of every block that has such a parameter, and the parameter's first dimension."""
    suffix = f".{parameter}"
    blocks = []
    for key in tensors:
        if key.endswith(suffix):
            blocks.append((key.removesuffix(suffix), sizes(tensors, key, rank)[0]))
    return tuple(sorted(blocks, key=_natural_order))


def _natural_order(block: tuple[str, int]) -> list:
    """Sort key that puts input_blocks.10 after input_blocks.9."""
    parts = re.split(r"(\d+)", block[0])
    return [part.zfill(9) if part.isdecimal() else part for part in parts]


def _described(facts: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Architecture out of its JSON; raises whatever malformed JSON leads to."""
    if "sem_inpainter" in facts:
        inpainter = SemInpainterConfig(**facts["sem_inpainter"])
        for field in dataclasses.fields(inpainter):
            if field.name != "layer_norm_eps":
                _check_size(field.name, getattr(inpainter, field.name))
        _check_epsilon(inpainter.layer_norm_eps)
        facts["sem_inpainter"] = inpainter
    if "ref_adapter" in facts:
        facts["ref_adapter"] = _described_adapter(**facts["ref_adapter"])
    for name in ("unet_num_heads", "clip_text_num_heads", "clip_vision_num_heads"):
        if facts.get(name) is not None:
            _check_size(name, facts[name])
    return facts


def _described_adapter(visual_size: Any, num_heads: Any, blocks: Any) -> RefAdapterConfig:
    _check_size("visual_size", visual_size)
    _check_size("num_heads", num_heads)
    described = []
    for name, width in blocks:
        if not isinstance(name, str):
            raise TypeError("a block's name is no text")
        _check_size("a block's width", width)
        described.append((name, width))
    return RefAdapterConfig(visual_size, num_heads, tuple(described))


def _check_size(name: str, value: Any) -> None:
    """Raise ArchitectureError unless a fact is a size that a tensor can have."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= LARGEST_SIZE:
        raise ArchitectureError(
            f"{name} in the metadata is {_short(repr(value))}, "
            f"expected a whole number from 1 to {LARGEST_SIZE:,}"
        )


def _check_epsilon(value: Any) -> None:
    if not isinstance(value, float) or not 0 < value < 1:
        raise ArchitectureError(
            f"layer_norm_eps in the metadata is {_short(repr(value))}, "
            "expected a number between 0 and 1"
        )


def _short(text: str) -> str:
    """The beginning of a text that anybody wrote, for messages."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= 80 else f"{plain[:77]}..."
