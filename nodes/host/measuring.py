"""What the benchmark asks of the host: its choices, one step of its sampling, its own loaders."""

import comfy.clip_vision
import comfy.k_diffusion.sampling
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_management
import comfy.ops
import comfy.samplers
import comfy.sd
import comfyui_version
import torch

from . import symbols


def version() -> str:
    """ComfyUI's own."""
    return comfyui_version.__version__


def attention_name() -> str:
    """The function that the host computes attention with."""
    return comfy.ldm.modules.attention.optimized_attention.__name__


def schedule(model, name: str, steps: int) -> torch.Tensor:
    """The host's noise levels by the name of a scheduler, descending, (steps + 1,)."""
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, name, steps)


def euler_step(denoiser, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict) -> torch.Tensor:
    """One step from the first noise level to the second, (2,); the host's ddim is made of these.

    comfy/k_diffusion/sampling.py:190, which is called inside a sampling: see sample_on_sigmas.
    """
    return comfy.k_diffusion.sampling.sample_euler(
        denoiser, x, sigmas.to(x.device), extra_args=extra_args, disable=True
    )


def load_patches(*models) -> None:
    """Load what the patches of MODELs bring, as the host does before it samples."""
    patchers = []
    for model in models:
        patchers += model.model_patches_models()
    comfy.model_management.load_models_gpu(patchers)


def bytes_of_patches(model) -> int:
    """What the patches of a MODEL hold beside it, as the host counts it."""
    return sum(patcher.model_size() for patcher in model.model_patches_models())


def unet_without_memory(model) -> torch.nn.Module:
    """The U-Net of a MODEL once more, in fp32 on `meta`: shapes alone, nothing is computed."""
    config = symbols.model_config(model).unet_config | {"dtype": torch.float32}
    return comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **config, device=torch.device("meta"), operations=comfy.ops.disable_weight_init
    )


def load_with_stock_loaders(checkpoint: str, clip_vision: str) -> tuple:
    """What CheckpointLoaderSimple and CLIPVisionLoader make of two files."""
    return (
        comfy.sd.load_checkpoint_guess_config(checkpoint),
        comfy.clip_vision.load(clip_vision),
    )
