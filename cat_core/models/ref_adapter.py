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

    def forward(self, x, visual_prompt):
        q, k, v = self.to_q(x), self.to_k(visual_prompt), self.to_v(visual_prompt)
        return self.to_out[0](self.attention(q, k, v, self.heads))


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


class FoldedBlock(nn.Module):
    """One adapter with P visual prompts folded into it: what is left to compute in every step of a sampling.

    With keys K and values V fixed, a head adds softmax(n A) B, where n is the normalised x, A = W_q^T K^T / sqrt(d) and
    B = V W_o^T: two products with heads * M columns take the place of the query and output projections with C columns and
    of the attention between them. A narrow block keeps the projections: whichever multiplies less. Each head's weights add
    up to 1, so the output's bias is part of B.

    Args:
        block: the adapter. Its weights are read in fp32 and not kept.
        visual_prompt: (P, M, D).
        dtype: of what is kept.
    """

    def __init__(self, block: RefAdapterBlock, visual_prompt: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        attn, norm = block.attn3, block.norm4
        self.heads, self.attention, self.prompts = attn.heads, attn.attention, len(visual_prompt)
        to_q, to_k, to_v, to_out = (layer.weight.float() for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]))
        visual_prompt = visual_prompt.to(to_k)
        k, v = visual_prompt @ to_k.T, visual_prompt @ to_v.T  # (P, M, C)
        k = k - k.mean(dim=1, keepdim=True)  # softmax does not see what all keys share; smaller scores round less
        bias, (tokens, width) = attn.to_out[0].bias.float(), k.shape[1:]
        if self.heads * tokens < width + tokens:
            k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (k, v))  # (P, heads, M, d)
            first = (k @ to_q.unflatten(0, (self.heads, -1))).flatten(1, 2) * (width // self.heads) ** -0.5
            last = (v @ to_out.T.unflatten(0, (self.heads, -1))).flatten(1, 2) + bias / self.heads  # (P, heads * M, C), as first
            keys = values = None
        else:
            first, keys, values, last = to_q[None], k, v, to_out[None]
        for name, constant in (("scale", norm.weight), ("shift", norm.bias), ("first", first), ("keys", keys),
                               ("values", values), ("last", last), ("bias", bias)):
            constant = None if constant is None else nn.Parameter(constant.detach().to(dtype).contiguous(), requires_grad=False)
            self.register_parameter(name, constant)

    def forward(self, x: torch.Tensor, conditional: list[bool], strength: float = 1.0) -> torch.Tensor:
        """Hidden states with the adapter's output added, times `strength`.

        Args:
            x: (B, N, C): as many batches of latents under each other as `conditional` has entries. Latent i of each
                looks at prompt i modulo P.
            conditional: which of the batches look at their prompts; the others get what an all-zero prompt adds, the bias.
        """
        x = x.contiguous()
        out, latents = torch.empty_like(x), len(x) // len(conditional)
        for i, looks in enumerate(conditional):
            rows = slice(i * latents, (i + 1) * latents)
            if looks:
                self.attend(x[rows], out[rows], strength)
            else:
                torch.add(x[rows], self.bias.to(x), alpha=strength, out=out[rows])
        return out

    def attend(self, x: torch.Tensor, out: torch.Tensor, strength: float) -> None:
        """Write x (B, N, C) plus `strength` times its attention to the prompts into `out`; both contiguous."""
        groups = len(x) if self.prompts > 1 else 1  # one prompt: all latents in one product
        x, out = x.view(groups, -1, x.shape[2]), out.view(groups, -1, x.shape[2])

        def of_groups(constant):
            chosen = constant.to(x)
            if len(chosen) == 1:
                return chosen.expand(groups, -1, -1)
            return chosen[:groups] if len(chosen) >= groups else chosen[torch.arange(groups, device=x.device) % len(chosen)]

        h = nn.functional.layer_norm(x, x.shape[2:], self.scale.to(x), self.shift.to(x))
        h = h @ of_groups(self.first).transpose(1, 2)
        if self.keys is None:
            h = h.unflatten(2, (self.heads, -1)).softmax(dim=3).flatten(2)  # (groups, tokens, heads * M)
            torch.baddbmm(x, h, of_groups(self.last), alpha=strength, out=out)
        else:
            h = self.attention(h, of_groups(self.keys), of_groups(self.values), self.heads)  # (groups, tokens, C)
            torch.add(x, nn.functional.linear(h, self.last[0].to(x), self.bias.to(x)), alpha=strength, out=out)


class FoldedRefAdapter(nn.Module):
    """A RefAdapter with visual prompts folded into all its blocks, see FoldedBlock; it needs the RefAdapter no more."""

    def __init__(self, adapter: RefAdapter, visual_prompt: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        names = [name for name, _ in adapter.config.blocks]
        self.number = {name: i for i, name in enumerate(names)}
        self.blocks = nn.ModuleList(FoldedBlock(adapter.block(name), visual_prompt, dtype) for name in names)

    def block(self, name: str) -> FoldedBlock:
        """The adapter for the U-Net's transformer block `name`; KeyError if there is none."""
        return self.blocks[self.number[name]]
