"""The host's U-Net, its noise levels and its VAE: what they must be like to fit."""

import torch

from ...cat_core.config import RefAdapterConfig, unet_blocks
from . import symbols


def check_unet(model, config: RefAdapterConfig) -> None:
    """Raise unless `model` is for inpainting, with the adapter's transformer blocks."""
    unet = symbols.unet_module(model)
    blocks = unet_blocks(dict(unet.named_parameters()))
    if not symbols.is_sd_unet(unet) or dict(blocks) != dict(config.blocks):
        raise ValueError(
            f"RefAdapter does not fit this model ({symbols.model_kind(model)}, {len(blocks)} "
            "transformer blocks); it was made for a U-Net with "
            f"{len(config.blocks)} blocks. Load an SD 1.5 inpainting checkpoint."
        )
    channels = symbols.input_channels(unet)
    if channels != 9:
        raise ValueError(
            f"This model is not for inpainting: its U-Net takes {channels} channels, expected 9. "
            "Load an SD 1.5 inpainting checkpoint."
        )


def check_trainable(model) -> None:
    """Raise unless `model` is of SD 1.5's family and free of a visual prompt."""
    config = symbols.model_config(model)
    if not symbols.is_sd15(config):
        raise ValueError(
            f"RefAdapter cannot be trained for this model ({type(config).__name__}). "
            "Load an SD 1.5 inpainting checkpoint."
        )
    if symbols.middle_patches(model):
        raise ValueError(
            "This model looks at a visual prompt already. "
            "Connect the model from before CAT Apply RefAdapter."
        )


def check_context(model, context: torch.Tensor) -> None:
    """Raise unless the U-Net reads texts of that width, (B, L, T)."""
    weights = unet_weights(model)
    keys = (key for key in weights if key.endswith(".attn2.to_k.weight"))
    width = weights[next(keys)].shape[1]
    if width != context.shape[2]:
        raise ValueError(
            f"This CLIP's text is {context.shape[2]} wide, the model reads {width}. "
            "Use the model's own CLIP."
        )


def encode_sampled(vae, image: torch.Tensor, seed: int) -> torch.Tensor:
    """IMAGE -> latents (B, 4, h, w) sampled from the VAE's posterior; raises ValueError."""
    with symbols.sampled_posterior(vae, seed):
        return vae.encode(image)


def unet_weights(model) -> dict[str, torch.Tensor]:
    """The tensors of a MODEL's U-Net, by the official keys."""
    return symbols.unet_module(model).state_dict()


def unet_heads(model) -> int:
    """Attention heads in every block of an SD 1.5 model."""
    return symbols.model_config(model).unet_config["num_heads"]


def block_name(extra_options: dict) -> str:
    """The official name of the transformer block that calls a patch."""
    kind, number, index = symbols.calling_block(extra_options)
    parent = "middle_block" if kind == "middle" else f"{kind}_blocks.{number}"
    return f"{parent}.1.transformer_blocks.{index}"


def trained_sigmas(model) -> torch.Tensor:
    """The noise levels the model was trained on, ascending, (1000,) float32."""
    sigmas = symbols.discrete_sigmas(symbols.noise_schedule(model))
    if sigmas is None:
        raise ValueError(
            "The official schedule needs a model with discrete noise levels such as SD 1.5; "
            f"this one is {symbols.model_kind(model)}. Use its own scheduler."
        )
    return sigmas.float().cpu()


def vae_cell(vae) -> int:
    """Pixels along one side of a latent cell; raises for a VAE of another family."""
    channels = symbols.latent_channels(vae)
    if channels != 4:
        raise ValueError(
            f"This VAE makes latents of {channels} channels; SD 1.5 needs 4. Use SD 1.5's VAE."
        )
    return symbols.vae_cell(vae)
