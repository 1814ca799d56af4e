"""RefAdapter: cross-attention from the U-Net's latents onto the visual prompt."""

import torch
from torch import nn

from ..config import RefAdapterConfig
from . import layers


class CrossAttention(nn.Module):
    """Stable Diffusion's cross-attention: keys and values from the visual prompt, no biases but the last."""

    def __init__(self, width, visual_size, heads, ops, attention, **kwargs):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.to_q = ops.Linear(width, width, bias=False, **kwargs)
        self.to_k = ops.Linear(visual_size, width, bias=False, **kwargs)
        self.to_v = ops.Linear(visual_size, width, bias=False, **kwargs)
        self.to_out = nn.ModuleList([ops.Linear(width, width, **kwargs)])


class RefAdapterBlock(nn.Module):
    """The adapter of one transformer block; its output is added to the block's hidden states."""

    def __init__(self, width, visual_size, heads, ops=nn, attention=layers.attention, **kwargs):
        super().__init__()
        self.attn3 = CrossAttention(width, visual_size, heads, ops, attention, **kwargs)
        self.norm4 = ops.LayerNorm(width, **kwargs)

    def forward(self, x: torch.Tensor, visual_prompt: torch.Tensor) -> torch.Tensor:
        """(B, N, C) hidden states, (B, M, D) visual prompt -> (B, N, C) to add."""
        return self.attend(x, *self.keys_values(visual_prompt))

    def keys_values(self, visual_prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, M, D) -> keys and values (B, M, C): constant over a whole sampling."""
        return self.attn3.to_k(visual_prompt), self.attn3.to_v(visual_prompt)

    def attend(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, N, C) hidden states and their keys and values -> (B, N, C) to add."""
        q = self.attn3.to_q(self.norm4(x))
        return self.attn3.to_out[0](self.attn3.attention(q, k, v, self.attn3.heads))

    def unconditional(self, x: torch.Tensor) -> torch.Tensor:
        """What an all-zero visual prompt adds to any hidden states: the output bias, (1, 1, C)."""
        return self.attn3.to_out[0](x.new_zeros(1, 1, x.shape[2]))


class RefAdapter(nn.Module):
    """All adapters of one U-Net, each under the name of its transformer block, as in the official checkpoint.

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
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            module.add_module(leaf, RefAdapterBlock(width, config.visual_size, config.num_heads, ops, attention, **kwargs))

    def block(self, name: str) -> RefAdapterBlock:
        """The adapter for the U-Net's transformer block `name`; KeyError if there is none."""
        if name not in dict(self.config.blocks):
            raise KeyError(name)
        return self.get_submodule(name)
