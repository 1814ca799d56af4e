"""What a run starts from: CAT parts of a file, or new ones as wide as the networks around them."""

from collections.abc import Mapping

import torch
from torch import nn

from .. import weights
from ..config import Architecture, RefAdapterConfig, SemInpainterConfig, Tensors, block_order


def sem_inpainter_config(width: int, layers: int, heads: int, text_size: int) -> SemInpainterConfig:
    """A SemInpainter like the CLIP vision model that it imitates, given by its sizes."""
    return SemInpainterConfig(
        width, 4 * width, layers, heads, 16, text_size, 4 * text_size, 4 * width, 4 * width
    )


def ref_adapter_config(unet: Tensors, heads: int, visual_size: int) -> RefAdapterConfig:
    """One adapter for each transformer block of a U-Net with these tensors."""
    blocks = [
        (key.removesuffix(".attn2.to_q.weight"), tensor.shape[0])
        for key, tensor in unet.items()
        if key.endswith(".attn2.to_q.weight")
    ]
    return RefAdapterConfig(visual_size, heads, tuple(sorted(blocks, key=block_order)))


def trainable_parts(
    architecture: Architecture, parts: Mapping[str, Tensors], seed: int
) -> dict[str, nn.Module]:
    """SemInpainter and RefAdapter, as far as described, in fp32: with the tensors of `parts`, or fresh.

    Fresh is normal 0.02; RefAdapter's output is zero, so it has no effect yet.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = weights.cat_modules(architecture, dtype=torch.float32)
    for part, module in modules.items():
        if part in parts:
            module.load_state_dict(parts[part])
            continue
        for name, parameter in module.named_parameters():
            with torch.no_grad():
                if name.endswith("bias") or ".attn3.to_out." in name:
                    parameter.zero_()
                elif parameter.ndim > 1:
                    parameter.normal_(std=0.02, generator=generator)
    return modules
