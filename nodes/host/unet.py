"""The host's U-Net, its noise levels and its VAE: what they must be like to fit."""

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_sampling
import comfy.supported_models
import torch

from ...cat_core.config import RefAdapterConfig, unet_blocks

ANY_SIGMA = 999999999  # what the host calls the noise level before sampling starts


def check_unet(model, config: RefAdapterConfig) -> None:
    """Raise unless `model` is an SD 1.5 inpainting model whose transformer blocks are those of the adapter."""
    unet = model.model.diffusion_model
    blocks = unet_blocks(dict(unet.named_parameters()))
    is_unet = isinstance(unet, comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel)
    if not is_unet or dict(blocks) != dict(config.blocks):
        raise ValueError(
            f"RefAdapter does not fit this model ({type(model.model).__name__}, {len(blocks)} "
            "transformer blocks); it was made for a U-Net with "
            f"{len(config.blocks)} blocks. Load an SD 1.5 inpainting checkpoint."
        )
    channels = unet.in_channels
    if channels != 9:
        raise ValueError(
            f"This model is not for inpainting: its U-Net takes {channels} channels, expected 9. "
            "Load an SD 1.5 inpainting checkpoint."
        )


def check_trainable(model) -> None:
    """Raise unless `model` is of SD 1.5's family and free of a visual prompt."""
    if not isinstance(model.model.model_config, comfy.supported_models.SD15):
        raise ValueError(
            f"RefAdapter cannot be trained for this model ({type(model.model.model_config).__name__}). "
            "Load an SD 1.5 inpainting checkpoint."
        )
    if model.model_options.get("transformer_options", {}).get("patches", {}).get("middle_patch"):
        raise ValueError(
            "This model looks at a visual prompt already. Connect the model from before CAT Apply RefAdapter."
        )


def check_context(model, context: torch.Tensor) -> None:
    """Raise unless the U-Net reads texts of that width, (B, L, T)."""
    width = next(
        tensor.shape[1]
        for key, tensor in model.model.diffusion_model.state_dict().items()
        if key.endswith(".attn2.to_k.weight")
    )
    if width != context.shape[2]:
        raise ValueError(
            f"This CLIP's text is {context.shape[2]} wide, the model reads {width}. Use the model's own CLIP."
        )


def unet_heads(model) -> int:
    """Attention heads in every block of an SD 1.5 model."""
    return model.model.model_config.unet_config["num_heads"]


def compute_dtype(model) -> torch.dtype:
    """What the U-Net's hidden states are in."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def block_name(extra_options: dict) -> str:
    """The official name of the transformer block that calls a patch."""
    kind, number = extra_options["block"][:2]
    parent = "middle_block" if kind == "middle" else f"{kind}_blocks.{number}"
    return f"{parent}.1.transformer_blocks.{extra_options['block_index']}"


def percent_to_sigma(model, percent: float) -> float:
    """The noise level at a share of the sampling, as the host counts it."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def trained_sigmas(model) -> torch.Tensor:
    """The noise levels the model was trained on, ascending, (1000,) float32."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        raise ValueError(
            f"The official schedule needs a model with discrete noise levels such as SD 1.5; this one is "
            f"{type(model.model).__name__}. Use its own scheduler."
        )
    return sampling.sigmas.float().cpu()


def vae_cell(vae) -> int:
    """Pixels along one side of a latent cell; raises for a VAE of another family."""
    if vae.latent_channels != 4:
        raise ValueError(
            f"This VAE makes latents of {vae.latent_channels} channels; SD 1.5 needs 4. Use SD 1.5's VAE."
        )
    return vae.spacial_compression_encode()
