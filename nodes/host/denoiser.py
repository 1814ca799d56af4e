"""The host's own U-Net with RefAdapters as a differentiable module: the denoiser that training optimises."""

from pathlib import Path

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.lora
import comfy.model_detection
import comfy.ops
import comfy.supported_models
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...cat_core.config import Architecture
from ...cat_core.models.ref_adapter import RefAdapter
from ...cat_core.weights import Checkpoint
from .unet import block_name, unet_heads


class Denoiser(nn.Module):
    """(x (B, 9, h, w), timestep (B,), context (B, L, T), visual_prompt (B, M, D)) -> noise (B, 4, h, w).

    Args:
        unet: module with real parameters (see `trainable_unet`).
        ref_adapter: the same, or None to leave the visual prompt unseen.
        checkpointing: compute activations of RefAdapters and transformer blocks again in the backward pass.
    """

    def __init__(
        self, unet: nn.Module, ref_adapter: RefAdapter | None, checkpointing: bool = False
    ):
        super().__init__()
        self.unet, self.ref_adapter = unet, ref_adapter
        if checkpointing:
            for module in unet.modules():
                if isinstance(module, comfy.ldm.modules.attention.SpatialTransformer):
                    _checkpoint(module)

    def forward(self, x, timestep, context, visual_prompt):
        def middle_patch(hidden, extra_options):
            return hidden + self.ref_adapter.block(block_name(extra_options))(hidden, visual_prompt)

        options = {
            "patches": {"middle_patch": [middle_patch] if self.ref_adapter else []},
            "optimized_attention_override": _differentiable,
        }
        return self.unet(x, timestep, context=context, transformer_options=options)


def unet_of(model) -> Checkpoint:
    """A MODEL's U-Net as copies in fp32, its LoRAs included: the host's own weights are never trained."""
    prefix, tensors = "diffusion_model.", {}
    for key, ((weight, convert), *patches) in model.get_key_patches(prefix).items():
        weight = convert(weight.detach().to("cpu", torch.float32, copy=True), inplace=True)
        tensors[key.removeprefix(prefix)] = (
            comfy.lora.calculate_weight(patches, weight, key) if patches else weight
        )
    return Checkpoint(
        Path("MODEL"), {"unet": tensors}, Architecture(unet_num_heads=unet_heads(model))
    )


def trainable_unet(file: Checkpoint) -> nn.Module:
    """The host's U-Net class with the file's weights as fp32 parameters that can be trained."""
    tensors = file.parts["unet"]
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(tensors, ""))
    config.unet_config["num_heads"] = file.architecture.unet_num_heads
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **config.unet_config, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    unet.load_state_dict(tensors)
    return unet


def _differentiable(attention, *args, **kwargs):
    """PyTorch's attention has a memory-efficient backward; the host's choice for inference may have none."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _checkpoint(module: nn.Module) -> None:
    forward = module.forward

    def recomputed(x, context, transformer_options):
        # The U-Net writes the block's name into the same dict for every block; keep this block's.
        return checkpoint(forward, x, context, dict(transformer_options), use_reentrant=False)

    module.forward = recomputed
