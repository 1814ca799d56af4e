"""Plain modules of the host's own classes in any size: without a file, weights or a ModelPatcher.

All are in fp32. Their weights are uninitialised memory: whoever asks for them fills them, or builds
them on `meta` for their shapes alone.
"""

from collections.abc import Sequence

import torch
from torch import nn

from . import symbols


def unet(
    *,
    channels: int,
    multipliers: Sequence[int],
    transformer_depth: Sequence[int],
    res_blocks: int,
    heads: int,
    text_width: int,
) -> nn.Module:
    """SD 1.5's U-Net for inpainting, with 9 input channels.

    Args:
        channels: of the first level.
        multipliers: of the channels, by level.
        transformer_depth: transformer blocks behind each residual block, by level.
        res_blocks: residual blocks of a level.
        heads: of every attention.
        text_width: of the text that cross-attention reads.
    """
    # The host counts transformers by residual block; on the way up each level has one block more.
    depth = []
    depth_up = []
    for level_depth in transformer_depth:
        depth += [level_depth] * res_blocks
        depth_up += [level_depth] * (res_blocks + 1)
    config = {
        "image_size": 32,
        "in_channels": 9,
        "out_channels": 4,
        "model_channels": channels,
        "channel_mult": list(multipliers),
        "num_res_blocks": [res_blocks] * len(multipliers),
        "num_heads": heads,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "transformer_depth": depth,
        "transformer_depth_output": depth_up,
        "transformer_depth_middle": 1,
        "context_dim": text_width,
        "use_linear_in_transformer": False,
        "legacy": False,
    }
    return symbols.new_unet(config, symbols.LayersWithWeights)


def vae(*, channels: int, multipliers: Sequence[int], res_blocks: int) -> nn.Module:
    """SD 1.5's VAE; the host's norms ask for a multiple of 32 channels."""
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels,
        "ch_mult": list(multipliers),
        "num_res_blocks": res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return symbols.new_autoencoder({"ddconfig": ddconfig, "embed_dim": 4})


def clip_text(*, width: int, layers: int, heads: int, mlp_width: int) -> nn.Module:
    """CLIP's text part; the host gives it a text projection, which SD 1.5 does not have."""
    config = symbols.stock_text_config() | {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return symbols.new_text_encoder(config, torch.float32)


def clip_vision(
    *, width: int, layers: int, heads: int, mlp_width: int, projection: int | None = None
) -> nn.Module:
    """CLIP's vision part for 224 pixels in patches of 14.

    Args:
        projection: width of CLIP's common space; None for no projection into it.
    """
    config = {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "image_size": 224,
        "patch_size": 14,
        "num_channels": 3,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    if projection is not None:
        config["projection_dim"] = projection
    return symbols.new_image_encoder(config, torch.float32)
