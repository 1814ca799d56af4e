"""LoRA on the U-Net's attention: low-rank additions to its linear layers (arXiv 2106.09685)."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import CatError

# Of every attention, with the text and with itself. RefAdapter's own (attn3) is no part of the
# U-Net.
TARGETS = tuple(
    f".{attention}.{layer}"
    for attention in ("attn1", "attn2")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
)


class LoraError(CatError):
    """A LoRA that fits no U-Net, or not this one."""


class LowRank(nn.Module):
    """What is added to a linear layer's output: up(down(x)), (..., in) -> (..., out)."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.lora_down = nn.Linear(inputs, rank, bias=False)
        self.lora_up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_up(self.lora_down(x))


class UnetLora(nn.Module):
    """Low-rank additions to a U-Net's attention layers, without effect at first.

    Its state dict has the keys that LoRA loaders know, without their prefix "diffusion_model.":
    NAME.lora_down.weight (r, in) and NAME.lora_up.weight (out, r), where NAME is the layer's in the
    U-Net. Without an alpha they take it at full strength.

    Args:
        unet: the U-Net's tensors.
        rank: r, at least 1.

    Raises LoraError: no such rank, or a U-Net without attention.
    """

    def __init__(self, unet: Mapping[str, torch.Tensor], rank: int):
        super().__init__()
        if rank < 1:
            raise LoraError(f"The LoRA's rank is {rank}, expected 1 or more, such as 16.")
        self.rank = rank
        self.additions: dict[str, LowRank] = {}
        for key, tensor in unet.items():
            name = key.removesuffix(".weight")
            if name == key or not name.endswith(TARGETS):
                continue
            outputs, inputs = tensor.shape
            addition = LowRank(inputs, outputs, rank)
            self.additions[name] = addition
            _place(self, name, addition)
        if not self.additions:
            raise LoraError("This U-Net has no attention layers for a LoRA; expected SD 1.5's.")

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """New weights: the first matrices at random, the second zero."""
        for addition in self.additions.values():
            down = addition.lora_down.weight
            down.normal_(std=1 / math.sqrt(down.shape[1]), generator=generator)
            addition.lora_up.weight.zero_()

    @torch.no_grad()
    def merged(self, unet: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A U-Net's tensors with the additions in them, those as new tensors on the CPU."""
        result = dict(unet)
        for name, addition in self.additions.items():
            key = f"{name}.weight"
            product = addition.lora_up.weight.cpu() @ addition.lora_down.weight.cpu()
            result[key] = (unet[key].cpu() + product).to(unet[key].dtype)
        return result

    def attach(self, unet: nn.Module) -> None:
        """Let a U-Net's layers add what is learned here to their outputs."""
        for name, addition in self.additions.items():
            _attach(unet.get_submodule(name), addition)


def rank_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """The rank of a LoRA's tensors; raises LoraError where they have none, or several."""
    ranks = set()
    for key, tensor in tensors.items():
        if key.endswith(".lora_down.weight"):
            ranks.add(tensor.shape[0])
    if len(ranks) != 1:
        raise LoraError(f"The LoRA has the ranks {sorted(ranks)}, expected one for all layers.")
    return ranks.pop()


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module under a name with dots."""
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(last, module)


def _attach(layer: nn.Module, addition: LowRank) -> None:
    def add(_, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + addition(inputs[0])

    layer.register_forward_hook(add)
