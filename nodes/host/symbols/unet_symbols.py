"""The U-Net: the module inside a MODEL, its description, its noise levels, and new ones."""

from collections.abc import Iterator
from typing import Any, cast

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_detection
import comfy.model_management
import comfy.model_sampling
import comfy.supported_models
import torch

from .weights_and_memory import compute_device

# comfy/model_base.py:172 (diffusion_model): of the U-Net's keys within a MODEL. Without it a
# MODEL's weights cannot be told from others.
UNET_PREFIX = "diffusion_model."


def unet_module(model) -> Any:
    """The network inside a MODEL.

    comfy/model_base.py:172 (diffusion_model). Without it no RefAdapter is compared with its U-Net.
    """
    return model.model.diffusion_model


def is_sd_unet(module) -> bool:
    """Whether a network is of the class that SD 1.5 shares with SDXL.

    comfy/ldm/modules/diffusionmodules/openaimodel.py:378 (UNetModel). Without it a model of
    another kind is refused by the names of its blocks alone.
    """
    return isinstance(module, comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel)


def input_channels(unet) -> int:
    """9 of a U-Net for inpainting.

    comfy/ldm/modules/diffusionmodules/openaimodel.py:468 (in_channels). Without it one that is not
    for inpainting is noticed by its pictures.
    """
    return unet.in_channels


def new_unet(config: dict, operations, device: torch.device | None = None):
    """The host's U-Net in fp32; its weights are what the operations make of them.

    comfy/ldm/modules/diffusionmodules/openaimodel.py:378 (UNetModel). Without it there is no
    training, and keys of a file cannot be checked.
    """
    in_fp32: dict[str, Any] = {**config, "dtype": torch.float32}
    return comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **in_fp32, device=device, operations=operations
    )


def spatial_transformers(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of a U-Net that hold its transformer blocks.

    comfy/ldm/modules/attention.py:1001 (SpatialTransformer). Without them there are no activation
    checkpoints in training.
    """
    for module in unet.modules():
        if isinstance(module, comfy.ldm.modules.attention.SpatialTransformer):
            yield module


def sd15_config(tensors, heads: int):
    """The host's description of an SD 1.5 U-Net of any width, read off its tensors.

    comfy/model_detection.py:44 (detect_unet_config) and comfy/supported_models.py:47 (SD15).
    Tensors do not tell the number of heads. Without it no U-Net loads.
    """
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(tensors, ""))
    config.unet_config["num_heads"] = heads
    return config


def is_sd15(config) -> bool:
    """Whether a description is of SD 1.5's family.

    comfy/supported_models.py:47 (SD15). Without it training starts for models it does not fit.
    """
    return isinstance(config, comfy.supported_models.SD15)


def set_dtypes(config, parameters: int, weight_dtype: torch.dtype) -> torch.dtype:
    """Write the types that the host would choose into a description; returns that of the weights.

    comfy/model_management.py:1098 (unet_dtype), comfy/model_management.py:1151 (unet_manual_cast)
    and comfy/supported_models_base.py:118 (set_inference_dtype). Without them all is fp32.
    """
    supported = list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=weight_dtype
    )
    cast = comfy.model_management.unet_manual_cast(dtype, compute_device(), supported)
    config.set_inference_dtype(dtype, cast)
    return dtype


def load_device_of_unet(parameters: int, dtype: torch.dtype) -> torch.device:
    """Where the host would have a U-Net of that size built; the typing error is its own.

    comfy/model_management.py:1074 (unet_inital_load_device). Without it build on
    unet_offload_device().
    """
    return comfy.model_management.unet_inital_load_device(parameters, dtype)


def new_base_model(config, tensors: dict[str, torch.Tensor], device: torch.device):
    """What a MODEL's patcher holds: U-Net, latent format and noise levels, without its weights.

    comfy/supported_models_base.py:81 (get_model). Without it no U-Net loads.
    """
    return config.get_model(tensors, "", device=device)


def fill_base_model(model, tensors: dict[str, torch.Tensor], assign: bool) -> None:
    """Load a U-Net's weights; `tensors` is emptied.

    comfy/model_base.py:349 (load_model_weights). Without it no U-Net loads.
    """
    model.load_model_weights(tensors, "", assign=assign)


def model_config(model):
    """The description a MODEL was built by: its class, and `unet_config`.

    comfy/model_base.py:161 (model_config). Without it heads and family of a U-Net are unknown to
    the training.
    """
    return model.model.model_config


def model_kind(model) -> str:
    """What the host calls the family of a MODEL, to name it in an error.

    comfy/model_base.py:155 (BaseModel). Without it errors do not say what was found.
    """
    return type(model.model).__name__


def compute_dtype(model) -> torch.dtype:
    """What a U-Net's hidden states are in.

    comfy/model_base.py:255 (manual_cast_dtype) and comfy/model_base.py:249 (get_dtype). Without
    them the folded matrices may be of another type than the U-Net.
    """
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def scale_latent(model, latent: torch.Tensor) -> torch.Tensor:
    """A VAE's latent -> as the U-Net sees it.

    comfy/model_base.py:366 (process_latent_in). Without it training sees latents at the wrong
    scale.
    """
    return model.model.process_latent_in(latent)


def latent_scale(model) -> float:
    """The factor of scale_latent.

    comfy/model_base.py:160 (latent_format) and comfy/latent_formats.py:21 (scale_factor). Without
    it the official latents cannot be compared.
    """
    return model.model.latent_format.scale_factor


def noise_schedule(model) -> Any:
    """The noise levels of a MODEL and how it counts them, with what other nodes changed.

    comfy/model_patcher.py:742 (get_model_object); `model_sampling` is named in
    comfy/model_base.py:182 (model_sampling). Without it there is no CAT Scheduler.
    """
    return model.get_model_object("model_sampling")


def discrete_sigmas(schedule) -> torch.Tensor | None:
    """The noise levels of a schedule that counts them, ascending; None of a continuous one.

    comfy/model_sampling.py:141 (ModelSamplingDiscrete) and comfy/model_sampling.py:187 (sigmas).
    Without them there is no CAT Scheduler.
    """
    if not isinstance(schedule, comfy.model_sampling.ModelSamplingDiscrete):
        return None
    return cast(torch.Tensor, schedule.sigmas)


def sigma_at(schedule, percent: float) -> float:
    """The noise level at a share of the sampling, as the host counts it.

    comfy/model_sampling.py:211 (percent_to_sigma). Without it start_percent and end_percent have
    no meaning.
    """
    return float(schedule.percent_to_sigma(percent))
