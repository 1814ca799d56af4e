"""RefAdapter step by step from the official code to the shipped one, as patches of the U-Net."""

import torch

from cat_diffusion.nodes.host import symbols
from cat_diffusion.nodes.host.symbols import POSITIVE
from cat_diffusion.nodes.host.unet import block_name

PLAIN = "plain SD inpainting"
OFFICIAL = "CAT, RefAdapter as in the official code"
ONCE = "the same, keys and values computed once"
SKIPPED = "and no attention for unconditional rows"
SHIPPED = "CAT as shipped"


class OfficialPatch(symbols.Patch):
    """RefAdapter without shortcuts: keys and values in every call, attention for all rows.

    Args:
        adapter: ModelPatcher of a RefAdapter.
        tokens: (1, M, D), of the visual prompt.
    """

    def __init__(self, adapter, tokens: torch.Tensor):
        self.adapter = adapter
        self.tokens = tokens

    def __call__(self, x: torch.Tensor, extra_options: dict) -> torch.Tensor:
        block = self.adapter.model.block(block_name(extra_options))
        return x + block(x, self._prompts(x, symbols.kinds_of_batch(extra_options)))

    def models(self) -> list:
        return [self.adapter]

    def _prompts(self, x: torch.Tensor, conds: list[int]) -> torch.Tensor:
        """The visual prompt of each row of x; unconditional rows see zeros."""
        batch = len(x) // len(conds)
        tokens = self.tokens.to(x).expand(batch, -1, -1)
        nothing = torch.zeros_like(tokens)
        return torch.cat([tokens if cond == POSITIVE else nothing for cond in conds])


class KeptKeysPatch(OfficialPatch):
    """Keys and values are computed in the first call of each block and kept."""

    def __init__(self, adapter, tokens: torch.Tensor):
        super().__init__(adapter, tokens)
        self.kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor, extra_options: dict) -> torch.Tensor:
        name = block_name(extra_options)
        if name not in self.kept:
            self._keep(name, self._prompts(x, symbols.kinds_of_batch(extra_options)))
        return x + self._attention(name, x)

    def _keep(self, name: str, prompts: torch.Tensor) -> None:
        attention = self.adapter.model.block(name).attn3
        self.kept[name] = attention.to_k(prompts), attention.to_v(prompts)

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        block = self.adapter.model.block(name)
        attention = block.attn3
        keys, values = self.kept[name]
        queries = attention.to_q(block.norm4(x))
        seen = attention.attention(queries, keys, values, attention.heads)
        return attention.to_out[0](seen)


class SkippingPatch(KeptKeysPatch):
    """And attention for conditional rows alone: what the others get is the bias, exactly."""

    def __call__(self, x: torch.Tensor, extra_options: dict) -> torch.Tensor:
        conds = symbols.kinds_of_batch(extra_options)
        name = block_name(extra_options)
        chunks = x.unflatten(0, (len(conds), -1))  # (conds, B, N, C)
        looking = [number for number, cond in enumerate(conds) if cond == POSITIVE]
        rows = chunks[looking].flatten(0, 1)
        if name not in self.kept:
            self._keep(name, self._prompts(rows, [POSITIVE] * len(looking)))
        added = iter(self._attention(name, rows).unflatten(0, (len(looking), -1)))
        bias = self.adapter.model.block(name).attn3.to_out[0].bias.to(x)
        seen = []
        for chunk, cond in zip(chunks, conds, strict=True):
            seen.append(chunk + (next(added) if cond == POSITIVE else bias))
        return torch.cat(seen)
