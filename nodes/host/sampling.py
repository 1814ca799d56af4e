"""The host's sampler and the nodes around it, as a workflow would run them."""

from collections.abc import Callable

import torch

from . import symbols


def encode_prompt(clip, text: str):
    """The host's CLIPTextEncode: text -> CONDITIONING."""
    return symbols.run_stock_node("CLIPTextEncode", clip=clip, text=text)[0]


def decode(vae, latent: dict) -> torch.Tensor:
    """The host's VAEDecode: LATENT -> IMAGE (B, H, W, 3), as it leaves the VAE."""
    return symbols.run_stock_node("VAEDecode", vae=vae, samples=latent)[0]


def ksample(
    model,
    seed: int,
    steps: int,
    cfg: float,
    positive,
    negative,
    latent: dict,
    sampler: str = "ddim",
    scheduler: str = "ddim_uniform",
    denoise: float = 1.0,
) -> dict:
    """The host's KSampler without its bar in the terminal: LATENT -> LATENT.

    Takes what the node takes, and by its words; the defaults are the sampling of the paper.
    """
    with symbols.no_progress_bars():
        sampled = symbols.run_stock_node(
            "KSampler",
            model=model,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            positive=positive,
            negative=negative,
            latent_image=latent,
            denoise=denoise,
        )
    return sampled[0]


def noise_for(latent: torch.Tensor, seed: int = 0):
    """The noise that KSampler adds to a latent for a seed, (B, 4, h, w) like it."""
    return symbols.seeded_noise(latent, seed)


def sample_on_sigmas(
    model,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    cfg: float,
    positive,
    negative,
    latent: torch.Tensor,
    sampler: str | Callable = "ddim",
    callback: Callable | None = None,
) -> torch.Tensor:
    """The host's SamplerCustom: latents (B, 4, h, w).

    Args:
        noise: (B, 4, h, w) of variance 1; the host scales it to sigmas[0].
        sigmas: noise levels, descending, one more than steps.
        latent: (B, 4, h, w), what the noise is added to.
        sampler: the host's name of one, or a function like those of k-diffusion.
        callback: callback(step, denoised, x, steps) before each step.
    """
    return symbols.sample_custom(
        model,
        noise,
        cfg,
        symbols.new_sampler(sampler),
        sigmas,
        (positive, negative),
        latent,
        callback,
    )
