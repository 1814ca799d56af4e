"""What a run starts from: CAT parts of a file, or new ones as wide as the networks around them."""

from collections.abc import Mapping

import torch
from torch import nn

from .. import weights
from ..config import Architecture, RefAdapterConfig, SemInpainterConfig, Tensors, unet_blocks
from ..models.unet_lora import LoraError, UnetLora, rank_of

STD = 0.02  # of new weights, CLIP's initializer_range


def sem_inpainter_config(
    *, width: int, layers: int, heads: int, text_size: int
) -> SemInpainterConfig:
    """A SemInpainter like the CLIP vision model that it imitates, given by its sizes."""
    return SemInpainterConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        text_size=text_size,
        text_intermediate_size=4 * text_size,
        spatial_intermediate_size=4 * width,
        global_intermediate_size=4 * width,
    )


def ref_adapter_config(unet: Tensors, heads: int, visual_size: int) -> RefAdapterConfig:
    """One adapter for each transformer block of a U-Net with these tensors."""
    return RefAdapterConfig(visual_size, heads, blocks=unet_blocks(unet))


def trainable_parts(
    architecture: Architecture, parts: Mapping[str, Tensors], seed: int
) -> dict[str, nn.Module]:
    """SemInpainter and RefAdapter, as far as described, in fp32.

    They have the tensors of `parts`, or are new: normal with a deviation of 0.02, but for
    RefAdapter's output, which is zero, so that it has no effect yet.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = weights.cat_modules(architecture, dtype=torch.float32)
    for part, module in modules.items():
        if part in parts:
            module.load_state_dict(parts[part])
        else:
            _initialise(module, generator)
    return modules


def unet_lora(parts: Mapping[str, Tensors], rank: int, seed: int) -> UnetLora:
    """A LoRA for the U-Net of a file's parts: theirs, or a new one without effect yet.

    Raises LoraError: no such rank, or theirs is of another rank or U-Net.
    """
    lora = UnetLora(parts["unet"], rank)
    lora.initialise(torch.Generator().manual_seed(seed))
    if "unet_lora" in parts:
        found = rank_of(parts["unet_lora"])
        if found != rank:
            raise LoraError(
                f"The LoRA to go on from has rank {found}, expected {rank}. Choose that rank."
            )
        try:
            lora.load_state_dict(parts["unet_lora"])
        except RuntimeError as error:
            raise LoraError(
                "The LoRA to go on from is of another U-Net. Choose the one that it was trained on."
            ) from error
    return lora


@torch.no_grad()
def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw a part's weights; the gains of its norms stay 1."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias") or ".attn3.to_out." in name:
            parameter.zero_()
        elif parameter.ndim > 1:
            parameter.normal_(std=STD, generator=generator)
