"""RefAdapter: cross-attention from the U-Net's latents onto the visual prompt."""

from typing import cast

import torch
from torch import nn

from ..config import RefAdapterConfig
from . import layers


class CrossAttention(nn.Module):
    """Stable Diffusion's cross-attention: keys and values come from the visual prompt.

    Only the last layer has a bias.
    """

    def __init__(self, width, visual_size, heads, ops, attention, **kwargs):
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.to_q = ops.Linear(width, width, bias=False, **kwargs)
        self.to_k = ops.Linear(visual_size, width, bias=False, **kwargs)
        self.to_v = ops.Linear(visual_size, width, bias=False, **kwargs)
        self.to_out = nn.ModuleList([ops.Linear(width, width, **kwargs)])

    @property
    def out(self) -> nn.Linear:
        """The last layer; Stable Diffusion keeps it in a list beside its dropout, as `to_out.0`."""
        return cast(nn.Linear, self.to_out[0])

    def forward(self, x, visual_prompt):
        q = self.to_q(x)
        k = self.to_k(visual_prompt)
        v = self.to_v(visual_prompt)
        return self.out(self.attention(q, k, v, self.heads))


class RefAdapterBlock(nn.Module):
    """The adapter of one transformer block; its output is added to the block's hidden states."""

    def __init__(self, width, visual_size, heads, ops=nn, attention=layers.attention, **kwargs):
        super().__init__()
        self.attn3 = CrossAttention(width, visual_size, heads, ops, attention, **kwargs)
        self.norm4 = ops.LayerNorm(width, **kwargs)

    def forward(self, x: torch.Tensor, visual_prompt: torch.Tensor) -> torch.Tensor:
        """(B, N, C) hidden states, (B, M, D) visual prompt -> (B, N, C) to add."""
        return self.attn3(self.norm4(x), visual_prompt)


class RefAdapter(nn.Module):
    """All adapters of one U-Net.

    Each is under the name of its transformer block, as in the official checkpoint.

    Args:
        config: blocks and widths.
        ops, attention, kwargs: as for SemInpainter.
    """

    def __init__(self, config: RefAdapterConfig, ops=nn, attention=layers.attention, **kwargs):
        super().__init__()
        self.config = config
        for name, width in config.blocks:
            *parents, leaf = name.split(".")
            module = self
            for parent in parents:
                module = _child(module, parent)
            block = RefAdapterBlock(
                width, config.visual_size, config.num_heads, ops, attention, **kwargs
            )
            module.add_module(leaf, block)

    def block(self, name: str) -> RefAdapterBlock:
        """The adapter for the U-Net's transformer block `name`; KeyError if there is none."""
        if name not in dict(self.config.blocks):
            raise KeyError(name)
        return cast(RefAdapterBlock, self.get_submodule(name))


def _child(module: nn.Module, name: str) -> nn.Module:
    """A module's child, made where there is none yet."""
    if name not in dict(module.named_children()):
        module.add_module(name, nn.Module())
    return module.get_submodule(name)
