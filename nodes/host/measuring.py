"""What the benchmark asks of the host: its choices, one step of its sampling, its own loaders."""

import comfyui_version
import torch

from . import symbols


def version() -> str:
    """ComfyUI's own."""
    return comfyui_version.__version__


def attention_name() -> str:
    """The function that the host computes attention with."""
    return symbols.attention_name()


def schedule(model, name: str, steps: int) -> torch.Tensor:
    """The host's noise levels by the name of a scheduler, descending, (steps + 1,)."""
    return symbols.scheduled_sigmas(symbols.noise_schedule(model), name, steps)


def euler_step(denoiser, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict) -> torch.Tensor:
    """One step from the first noise level to the second, (2,); the host's ddim is made of these.

    It is called inside a sampling: see sample_on_sigmas.
    """
    return symbols.sample_euler(denoiser, x, sigmas.to(x.device), extra_args)


def load_patches(*models) -> None:
    """Load what the patches of MODELs bring, as the host does before it samples."""
    patchers = []
    for model in models:
        patchers += symbols.patchers_of_patches(model)
    symbols.load(patchers)


def bytes_of_patches(model) -> int:
    """What the patches of a MODEL hold beside it, as the host counts it."""
    return symbols.bytes_of(symbols.patchers_of_patches(model))


def unet_without_memory(model) -> torch.nn.Module:
    """The U-Net of a MODEL once more, in fp32 on `meta`: shapes alone, nothing is computed."""
    config = symbols.model_config(model).unet_config
    return symbols.new_unet(config, symbols.PLAIN_LAYERS, torch.device("meta"))


def unet_inputs_without_memory(model, rows: int, cells: int) -> tuple[torch.Tensor, ...]:
    """x (rows, 9, cells, cells), timesteps (rows,) and context (rows, 77, T) on `meta`."""
    meta = torch.device("meta")
    config = symbols.model_config(model).unet_config
    x = torch.empty(rows, config["in_channels"], cells, cells, device=meta)
    timesteps = torch.empty(rows, device=meta)
    context = torch.empty(rows, 77, config["context_dim"], device=meta)
    return x, timesteps, context


def load_with_stock_loaders(checkpoint: str, clip_vision: str) -> tuple:
    """What CheckpointLoaderSimple and CLIPVisionLoader make of two files."""
    return symbols.load_stock_checkpoint(checkpoint), symbols.load_stock_clip_vision(clip_vision)
