"""The host's U-Net with RefAdapters as a differentiable module: what training optimises."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...cat_core.config import Architecture
from ...cat_core.models.ref_adapter import RefAdapter
from ...cat_core.models.unet_lora import UnetLora
from ...cat_core.weights import Checkpoint
from . import symbols
from .unet import block_name, unet_heads


class Denoiser(nn.Module):
    """Noise (B, 4, h, w) in a latent, as the U-Net sees it beside the visual prompt.

    Takes x (B, 9, h, w), timestep (B,), context (B, L, T), visual_prompt (B, M, D).

    Args:
        unet: module with real parameters (see `trainable_unet`).
        ref_adapter: the same, or None to leave the visual prompt unseen.
        checkpointing: compute activations of RefAdapters and transformer blocks again in the
            backward pass.
        unet_lora: attached to the U-Net already; held here, so that it learns like the others.
    """

    def __init__(
        self,
        unet: nn.Module,
        ref_adapter: RefAdapter | None,
        checkpointing: bool = False,
        unet_lora: UnetLora | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.ref_adapter = ref_adapter
        self.unet_lora = unet_lora
        if checkpointing:
            for module in symbols.spatial_transformers(unet):
                _checkpoint(module)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        visual_prompt: torch.Tensor,
    ) -> torch.Tensor:
        adapter = self.ref_adapter
        patches = []
        if adapter is not None:

            def middle_patch(hidden, extra_options):
                block = adapter.block(block_name(extra_options))
                return hidden + block(hidden, visual_prompt)

            patches.append(middle_patch)
        options = symbols.unet_options(patches, _differentiable)
        return symbols.call_unet(self.unet, x, timestep, context, options)


def unet_of(model) -> Checkpoint:
    """A MODEL's U-Net as copies in fp32, its LoRAs included.

    The host's own weights are never trained.
    """
    tensors = {}
    for key, tensor in symbols.patched_weights(model, symbols.UNET_PREFIX):
        tensors[key.removeprefix(symbols.UNET_PREFIX)] = tensor
    architecture = Architecture(unet_num_heads=unet_heads(model))
    return Checkpoint(Path("MODEL"), {"unet": tensors}, architecture)


def trainable_unet(file: Checkpoint) -> nn.Module:
    """The host's U-Net class with the file's weights as fp32 parameters that can be trained."""
    tensors = file.parts["unet"]
    config = symbols.sd15_config(tensors, file.architecture.unet_num_heads)
    unet = symbols.new_unet(config.unet_config, symbols.PLAIN_LAYERS)
    unet.load_state_dict(tensors)
    return unet


def _differentiable(attention, *args, **kwargs):
    """Another function than `attention`, the host's choice for inference."""
    return symbols.differentiable_attention(*args, **kwargs)


def _checkpoint(module: nn.Module) -> None:
    """Let a module forget its activations, and compute them again in the backward pass."""
    forward = module.forward

    def recomputed(x, context, transformer_options):
        # The U-Net writes the block's name into the same dict for every block, in
        # comfy/ldm/modules/diffusionmodules/openaimodel.py:879 (block): keep this one's.
        own_options = dict(transformer_options)
        return checkpoint(forward, x, context, own_options, use_reentrant=False)

    module.forward = recomputed
