"""RefAdapter with a visual prompt folded in: what is left to compute in each step of a sampling."""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import nn

from .ref_adapter import RefAdapter, RefAdapterBlock

UNCONDITIONAL = -1  # in the place of a latent: the row looks at no visual prompt


class Run:
    """Rows under each other that one attention serves, or that get the bias alone.

    Args:
        latents: the latent that each row belongs to, ascending, or UNCONDITIONAL for all of them.
    """

    def __init__(self, latents: list[int]):
        self.latents = latents
        self.rows = len(latents)
        self.conditional = latents[0] != UNCONDITIONAL
        self._indices: dict[tuple[int, torch.device], torch.Tensor] = {}

    def of_prompts(self, constant: torch.Tensor) -> torch.Tensor:
        """(P, ...) -> (rows, ...), or (1, ...) of one prompt: what the latents look at.

        Latent i looks at prompt i modulo P.
        """
        prompts = len(constant)
        if prompts == 1:
            return constant
        chosen = [latent % prompts for latent in self.latents]
        first = chosen[0]
        if chosen != list(range(first, first + self.rows)):
            return constant[self._index(chosen, prompts, constant.device)]
        return constant if self.rows == prompts else constant[first : first + self.rows]

    def _index(self, chosen: list[int], prompts: int, device: torch.device) -> torch.Tensor:
        """Kept, as a GPU waits for what it is sent from a list."""
        key = (prompts, device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(chosen, device=device)
        return self._indices[key]


def runs_of(latents: Sequence[int]) -> list[Run]:
    """The rows of a batch in runs.

    One ends where another kind of rows begins, or the latents start again: each prompt that the
    host puts under another is served apart, so that it does not matter which others come with it.

    Args:
        latents: the latent that each row belongs to, UNCONDITIONAL where it looks at no prompt.
    """
    runs: list[list[int]] = []
    for latent in latents:
        last = runs[-1][-1] if runs else None
        both_unconditional = latent == last == UNCONDITIONAL
        goes_on = last not in (None, UNCONDITIONAL) and latent > last
        if both_unconditional or goes_on:
            runs[-1].append(latent)
        else:
            runs.append([latent])
    return [Run(run) for run in runs]


class PromptedBlock(nn.Module):
    """One adapter that has its P visual prompts inside; a subclass says in which form.

    Args:
        block: the adapter. Its weights are read in fp32 and not kept.
        visual_prompt: (P, M, D).
        dtype: of what is kept.
    """

    def __init__(self, block: RefAdapterBlock, visual_prompt: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.heads = block.attn3.heads
        self.prompts = len(visual_prompt)
        self.scale = _kept(block.norm4.weight, dtype)
        self.shift = _kept(block.norm4.bias, dtype)
        self.bias = _kept(block.attn3.out.bias, dtype)  # all that a zero prompt adds

    def forward(self, x: torch.Tensor, runs: list[Run], strength: float = 1.0) -> torch.Tensor:
        """Hidden states with the adapter's output added, times `strength`.

        Args:
            x: (B, N, C).
            runs: which rows look at which prompts, B rows in all. Those that look at none get what
                an all-zero prompt adds, the bias.
        """
        # Asked first, as even a call that changes nothing costs time in each step.
        if not x.is_contiguous():
            x = x.contiguous()
        block = self._beside(x)
        out = torch.empty_like(x)
        rows = [run.rows for run in runs]
        for run, latents, result in zip(runs, x.split(rows), out.split(rows), strict=True):
            if run.conditional:
                block.attend(latents, result, run, strength)
            else:
                torch.add(latents, block.bias, alpha=strength, out=result)
        return out

    def attend(self, x: torch.Tensor, out: torch.Tensor, run: Run, strength: float) -> None:
        """Write x (B, N, C) plus `strength` times its attention to the run's prompts into `out`.

        Both are contiguous. Kept to few operators: on a fast GPU it is their number that costs.
        """
        raise NotImplementedError

    def _beside(self, x: torch.Tensor) -> "PromptedBlock":
        """Itself, or a copy in x's type and place where the host left it elsewhere."""
        if self.bias.dtype == x.dtype and self.bias.device == x.device:
            return self
        moved = copy.copy(self)
        moved._parameters = {}
        for name, constant in self.named_parameters():
            setattr(moved, name, constant.to(x))
        return moved

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.scale, self.shift)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (groups, tokens, C): with one prompt, all latents in one product."""
        groups = len(x) if self.prompts > 1 else 1
        return x.view(groups, -1, x.shape[2])


class FoldedBlock(PromptedBlock):
    """Both projections folded into the prompt.

    With keys K and values V fixed, a head adds softmax(n A) B, where n is the normalised x,
    A = W_q^T K^T / sqrt(d) and B = V W_o^T: two products with heads * M columns take the place of
    the query and output projections with C columns and of the attention between them. Each head's
    weights add up to 1, so the output's bias is part of B.
    """

    def __init__(self, block: RefAdapterBlock, visual_prompt: torch.Tensor, dtype: torch.dtype):
        super().__init__(block, visual_prompt, dtype)
        to_q = block.attn3.to_q.weight.float()
        to_out = block.attn3.out.weight.float()
        bias = block.attn3.out.bias.float()
        keys, values = keys_and_values(block, visual_prompt)  # (P, M, C)
        heads = self.heads
        head_width = keys.shape[2] // heads  # d

        # A, with the columns of all heads beside each other.
        keys = rearrange(keys, "p m (h d) -> p h m d", h=heads)
        into_scores = keys @ rearrange(to_q, "(h d) c -> h d c", h=heads)
        into_scores = rearrange(into_scores, "p h m c -> p c (h m)")
        self.a = _kept(into_scores * head_width**-0.5, dtype)

        # B, with the rows of all heads below each other: the product adds the heads up.
        values = rearrange(values, "p m (h d) -> p h m d", h=heads)
        out_of_weights = values @ rearrange(to_out, "c (h d) -> h d c", h=heads)
        out_of_weights = rearrange(out_of_weights, "p h m c -> p (h m) c")
        self.b = _kept(out_of_weights + bias / heads, dtype)

    def attend(self, x, out, run, strength):
        x = self._grouped(x)
        out = self._grouped(out)
        groups = len(x)
        scores = torch.bmm(self._normalised(x), run.of_prompts(self.a))
        by_head = scores.view(groups, -1, self.heads, scores.shape[2] // self.heads)
        weights = by_head.softmax(3).view(scores.shape)  # (groups, tokens, heads * M)
        torch.baddbmm(x, weights, run.of_prompts(self.b), alpha=strength, out=out)


class CachedBlock(PromptedBlock):
    """Keys and values of the prompt computed once; both projections stay."""

    def __init__(self, block: RefAdapterBlock, visual_prompt: torch.Tensor, dtype: torch.dtype):
        super().__init__(block, visual_prompt, dtype)
        self.attention = block.attn3.attention
        keys, values = keys_and_values(block, visual_prompt)
        self.to_q = _kept(block.attn3.to_q.weight.T[None], dtype)  # (1, C, C)
        self.keys = _kept(keys, dtype)  # (P, M, C)
        self.values = _kept(values, dtype)  # (P, M, C)
        self.to_out = _kept(block.attn3.out.weight, dtype)  # (C, C)

    def attend(self, x, out, run, strength):
        x = self._grouped(x)
        out = self._grouped(out)
        to_q = self.to_q if len(x) == 1 else self.to_q.expand(len(x), -1, -1)
        q = torch.bmm(self._normalised(x), to_q)
        k = run.of_prompts(self.keys)
        v = run.of_prompts(self.values)
        seen = self.attention(q, k, v, self.heads)  # (groups, tokens, C)
        added = nn.functional.linear(seen, self.to_out, self.bias)
        torch.add(x, added, alpha=strength, out=out)


class FoldedRefAdapter(nn.Module):
    """A RefAdapter with visual prompts in all its blocks; it needs the RefAdapter no more."""

    def __init__(self, adapter: RefAdapter, visual_prompt: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        names = [name for name, _ in adapter.config.blocks]
        self.number = {name: i for i, name in enumerate(names)}
        self.blocks = nn.ModuleList(
            fold(adapter.block(name), visual_prompt, dtype) for name in names
        )

    def block(self, name: str) -> PromptedBlock:
        """The adapter for the U-Net's transformer block `name`; KeyError if there is none."""
        return cast(PromptedBlock, self.blocks[self.number[name]])


def fold(
    block: RefAdapterBlock, visual_prompt: torch.Tensor, dtype: torch.dtype
) -> FoldedBlock | CachedBlock:
    """Put visual prompts (P, M, D) into an adapter, in the form that multiplies less."""
    tokens = visual_prompt.shape[1]  # M
    width = len(block.norm4.weight)  # C
    folded = 2 * width * block.attn3.heads * tokens  # per latent token: n A, then times B
    cached = 2 * width * width + 2 * width * tokens  # projections, then scores and their sum
    form = FoldedBlock if folded < cached else CachedBlock
    return form(block, visual_prompt, dtype)


def keys_and_values(
    block: RefAdapterBlock, visual_prompt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the latents look at, in fp32: (P, M, D) -> (P, M, C) x 2."""
    to_k = block.attn3.to_k.weight.float()
    to_v = block.attn3.to_v.weight.float()
    visual_prompt = visual_prompt.to(to_k)
    keys = visual_prompt @ to_k.T
    values = visual_prompt @ to_v.T
    # Softmax does not see what all keys share, and smaller scores round less.
    return keys - keys.mean(dim=1, keepdim=True), values


def _kept(constant: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter, since those are what a host counts and moves."""
    return nn.Parameter(constant.detach().to(dtype).contiguous(), requires_grad=False)
