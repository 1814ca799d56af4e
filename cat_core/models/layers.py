"""Building blocks with the parameter names of Hugging Face's CLIP.

The official checkpoint uses the same names.

`ops` supplies Linear, LayerNorm and Embedding: `torch.nn` by default, a host's own classes inside
a host.
`attention(q, k, v, heads)` takes (B, N, C) tensors and returns (B, N, C).
"""

import torch
from torch import nn


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head scaled dot-product attention: (B, N, C), (B, M, C), (B, M, C) -> (B, N, C)."""
    out = nn.functional.scaled_dot_product_attention(
        _by_head(q, heads),
        _by_head(k, heads),
        _by_head(v, heads),
    )
    return out.transpose(1, 2).flatten(2)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two linear layers with quick_gelu between them: (..., D_in) -> (..., D_out)."""

    def __init__(self, in_size, intermediate_size, out_size, ops, **kwargs):
        super().__init__()
        self.fc1 = ops.Linear(in_size, intermediate_size, **kwargs)
        self.fc2 = ops.Linear(intermediate_size, out_size, **kwargs)

    def forward(self, x):
        return self.fc2(quick_gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """CLIP's self-attention, without a mask: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size, heads, ops, attention, **kwargs):
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.k_proj = ops.Linear(hidden_size, hidden_size, **kwargs)
        self.v_proj = ops.Linear(hidden_size, hidden_size, **kwargs)
        self.q_proj = ops.Linear(hidden_size, hidden_size, **kwargs)
        self.out_proj = ops.Linear(hidden_size, hidden_size, **kwargs)

    def forward(self, x):
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return self.out_proj(self.attention(q, k, v, self.heads))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size, intermediate_size, heads, eps, ops, attention, **kwargs):
        super().__init__()
        self.self_attn = SelfAttention(hidden_size, heads, ops, attention, **kwargs)
        self.layer_norm1 = ops.LayerNorm(hidden_size, eps=eps, **kwargs)
        self.mlp = MLP(hidden_size, intermediate_size, hidden_size, ops, **kwargs)
        self.layer_norm2 = ops.LayerNorm(hidden_size, eps=eps, **kwargs)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))
