"""The host's sampler and the nodes around it, as a workflow would run them."""

from collections.abc import Callable

import comfy.sample
import comfy.samplers
import torch

import nodes

from .symbols import no_progress_bars


def encode_prompt(clip, text: str):
    """The host's CLIPTextEncode: text -> CONDITIONING."""
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def decode(vae, latent: dict) -> torch.Tensor:
    """The host's VAEDecode: LATENT -> IMAGE (B, H, W, 3), as it leaves the VAE."""
    return nodes.VAEDecode().decode(vae, latent)[0]


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
    with no_progress_bars():
        sampled = nodes.KSampler().sample(
            model,
            seed,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            latent,
            denoise=denoise,
        )
    return sampled[0]


def noise_for(latent: torch.Tensor, seed: int = 0):
    """The noise that KSampler adds to a latent for a seed, (B, 4, h, w) like it."""
    return comfy.sample.prepare_noise(latent, seed)


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
    """The host's SamplerCustom (comfy/sample.py:68): latents (B, 4, h, w).

    Args:
        noise: (B, 4, h, w) of variance 1; the host scales it to sigmas[0].
        sigmas: noise levels, descending, one more than steps.
        latent: (B, 4, h, w), what the noise is added to.
        sampler: the host's name of one, or a function like those of k-diffusion.
        callback: callback(step, denoised, x, steps) before each step.
    """
    by_name = isinstance(sampler, str)
    choose = comfy.samplers.sampler_object if by_name else comfy.samplers.KSAMPLER
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        choose(sampler),
        sigmas,
        positive,
        negative,
        latent,
        disable_pbar=True,
        seed=0,
        callback=callback,
    )
