"""A stage's objective, built of its modules: the one place that knows which stage takes what."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .objectives import Diffusion, Distillation, stable_diffusion_schedule
from .stages import Stage

# (unet, ref_adapter or None) -> Diffusion's denoiser. The U-Net is the host's, and so is this.
DenoiserFactory = Callable[[nn.Module, nn.Module | None], nn.Module]


def assemble(
    stage: Stage,
    modules: Mapping[str, Any],
    denoiser: DenoiserFactory,
    *,
    masked: bool = False,
    snr_gamma: float = 0.0,
) -> Distillation | Diffusion:
    """The objective that a stage minimises.

    Args:
        modules: part name -> module; sem_inpainter, ref_adapter and unet as far as the stage has
            a use for them, trained or frozen.
        denoiser: makes the denoiser of the diffusion stages; the others leave it alone.
        masked: Distillation's.
        snr_gamma: Diffusion's.
    """
    if not stage.diffusion:
        return Distillation(modules["sem_inpainter"], masked)
    return Diffusion(
        denoiser(modules["unet"], modules["ref_adapter"] if stage.prompt else None),
        stable_diffusion_schedule(),
        sem_inpainter=modules["sem_inpainter"] if stage.prompt == "predicted" else None,
        observed=stage.prompt == "observed",
        snr_gamma=snr_gamma,
        prompted=stage.prompt is not None,
    )
