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
            module.add_module(
                leaf,
                RefAdapterBlock(
                    width, config.visual_size, config.num_heads, ops, attention, **kwargs
                ),
            )

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
        to_q, to_k, to_v, to_out = (
            layer.weight.float() for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        )
        visual_prompt = visual_prompt.to(to_k)
        k, v = visual_prompt @ to_k.T, visual_prompt @ to_v.T  # (P, M, C)
        k = k - k.mean(
            dim=1, keepdim=True
        )  # softmax does not see what all keys share; smaller scores round less
        bias, (tokens, width) = attn.to_out[0].bias.float(), k.shape[1:]
        if self.heads * tokens < width + tokens:
            k, v = (
                t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (k, v)
            )  # (P, heads, M, d)
            first = (k @ to_q.unflatten(0, (self.heads, -1))).flatten(1, 2).transpose(1, 2) * (
                width // self.heads
            ) ** -0.5
            last = (v @ to_out.T.unflatten(0, (self.heads, -1))).flatten(1, 2) + bias / self.heads
            keys = values = None  # first (P, C, heads * M), last (P, heads * M, C)
        else:
            first, keys, values, last = (
                to_q.T[None],
                k,
                v,
                to_out,
            )  # (1, C, C), 2 x (P, M, C), (C, C)
        for name, constant in (
            ("scale", norm.weight),
            ("shift", norm.bias),
            ("first", first),
            ("keys", keys),
            ("values", values),
            ("last", last),
            ("bias", bias),
        ):
            constant = (
                None
                if constant is None
                else nn.Parameter(constant.detach().to(dtype).contiguous(), requires_grad=False)
            )
            self.register_parameter(name, constant)

    def forward(
        self, x: torch.Tensor, conditional: list[bool], strength: float = 1.0
    ) -> torch.Tensor:
        """Hidden states with the adapter's output added, times `strength`.

        Args:
            x: (B, N, C): as many batches of latents under each other as `conditional` has entries. Latent i of each
                looks at prompt i modulo P.
            conditional: which of the batches look at their prompts; the others get what an all-zero prompt adds, the bias.
        """
        x = x if x.is_contiguous() else x.contiguous()
        constants, out, shape = (
            self._constants(x),
            torch.empty_like(x),
            (len(conditional), -1, *x.shape[1:]),
        )
        for looks, rows, into in zip(conditional, x.view(shape).unbind(), out.view(shape).unbind()):
            if looks:
                self.attend(rows, into, strength, **constants)
            else:
                torch.add(rows, constants["bias"], alpha=strength, out=into)
        return out

    def attend(self, x, out, strength, scale, shift, first, keys, values, last, bias) -> None:
        """Write x (B, N, C) plus `strength` times its attention to the prompts into `out`; both contiguous.

        Kept to few operators: on a fast GPU it is their number that costs.
        """
        groups, width = (
            len(x) if self.prompts > 1 else 1,
            x.shape[2],
        )  # one prompt: all latents in one product
        x, out = x.view(groups, -1, width), out.view(groups, -1, width)
        h = torch.bmm(
            nn.functional.layer_norm(x, (width,), scale, shift), _of_groups(first, groups)
        )
        if keys is None:
            h = (
                h.view(groups, -1, self.heads, h.shape[2] // self.heads).softmax(3).view(h.shape)
            )  # (groups, tokens, heads * M)
            torch.baddbmm(x, h, _of_groups(last, groups), alpha=strength, out=out)
        else:
            h = self.attention(
                h, _of_groups(keys, groups), _of_groups(values, groups), self.heads
            )  # (groups, tokens, C)
            torch.add(x, nn.functional.linear(h, last, bias), alpha=strength, out=out)

    def _constants(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """What was folded, moved to x only where the host left it elsewhere."""
        if self.bias.dtype == x.dtype and self.bias.device == x.device:
            return self._parameters
        return {
            name: None if constant is None else constant.to(x)
            for name, constant in self._parameters.items()
        }


def _of_groups(constant: torch.Tensor, groups: int) -> torch.Tensor:
    """One of (P, ...) for each group; they repeat."""
    if len(constant) == groups:
        return constant
    if len(constant) == 1:
        return constant.expand(groups, -1, -1)
    return (
        constant[:groups]
        if len(constant) > groups
        else constant[torch.arange(groups, device=constant.device) % len(constant)]
    )


class FoldedRefAdapter(nn.Module):
    """A RefAdapter with visual prompts folded into all its blocks, see FoldedBlock; it needs the RefAdapter no more."""

    def __init__(self, adapter: RefAdapter, visual_prompt: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        names = [name for name, _ in adapter.config.blocks]
        self.number = {name: i for i, name in enumerate(names)}
        self.blocks = nn.ModuleList(
            FoldedBlock(adapter.block(name), visual_prompt, dtype) for name in names
        )

    def block(self, name: str) -> FoldedBlock:
        """The adapter for the U-Net's transformer block `name`; KeyError if there is none."""
        return self.blocks[self.number[name]]
