"""Sampling: the host's nodes called from code, its samplers and schedulers, its stock loaders."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import cast

import comfy.clip_vision
import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import node_helpers
import torch

import nodes


def run_stock_node(name: str, **inputs) -> tuple:
    """The outputs of one of the host's own nodes, by its id and the ids of its inputs.

    nodes.py:2049 (NODE_CLASS_MAPPINGS) and execution.py:344 (FUNCTION). Without them neither tools
    nor CAT Inpaint Conditioning can do what a workflow of stock nodes does.
    """
    node = nodes.NODE_CLASS_MAPPINGS[name]()
    return getattr(node, node.FUNCTION)(**inputs)


def with_values(conditioning, values: dict):
    """A copy of the CONDITIONING in which every entry has these values.

    node_helpers.py:9 (conditioning_set_values). Without it CAT Inpaint Conditioning copies the
    entries itself.
    """
    return node_helpers.conditioning_set_values(conditioning, values)


@contextmanager
def no_progress_bars():
    """Without the host's bars in the terminal.

    comfy/utils.py:1254 (PROGRESS_BAR_ENABLED), which nodes.py:1570 (PROGRESS_BAR_ENABLED) reads.
    Without it a tool's own lines are mixed with them.
    """
    shown = comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.PROGRESS_BAR_ENABLED = False
    try:
        yield
    finally:
        comfy.utils.PROGRESS_BAR_ENABLED = shown


def seeded_noise(latent: torch.Tensor, seed: int) -> torch.Tensor:
    """The noise that KSampler adds to a latent for a seed, of its shape.

    comfy/sample.py:22 (prepare_noise). Without it tools and nodes start from other noise.
    """
    return cast(torch.Tensor, comfy.sample.prepare_noise(latent, seed))


def new_sampler(sampler: str | Callable):
    """A SAMPLER by the host's name of one, or of a function like those of k-diffusion.

    comfy/samplers.py:1386 (sampler_object) and comfy/samplers.py:977 (KSAMPLER). Without them there
    is no sample_custom.
    """
    by_name = isinstance(sampler, str)
    choose = comfy.samplers.sampler_object if by_name else comfy.samplers.KSAMPLER
    return choose(sampler)


def sample_custom(model, noise, cfg: float, sampler, sigmas, conditionings, latent, callback):
    """The host's SamplerCustom without its bar: latents (B, 4, h, w).

    comfy/sample.py:78 (sample_custom). Without it parity cannot be shown through a whole sampling,
    and the benchmark has no step to measure.

    Args:
        conditionings: (positive, negative).
        callback: callback(step, denoised, x, steps), or None.
    """
    positive, negative = conditionings
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        latent,
        disable_pbar=True,
        seed=0,
        callback=callback,
    )


def scheduled_sigmas(schedule, scheduler: str, steps: int) -> torch.Tensor:
    """The host's noise levels by the name of a scheduler, descending, (steps + 1,).

    comfy/samplers.py:1376 (calculate_sigmas). Without it the benchmark has no step to measure.
    """
    return comfy.samplers.calculate_sigmas(schedule, scheduler, steps)


def sample_euler(denoiser, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict):
    """k-diffusion's Euler sampler without its bar, which is called inside a sampling.

    comfy/k_diffusion/sampling.py:190 (sample_euler). Without it the benchmark has no step to
    measure.
    """
    return comfy.k_diffusion.sampling.sample_euler(
        denoiser, x, sigmas, extra_args=extra_args, disable=True
    )


def load_stock_checkpoint(path: str) -> tuple:
    """What CheckpointLoaderSimple makes of a file: MODEL, CLIP, VAE and more.

    comfy/sd.py:1942 (load_checkpoint_guess_config). Without it the benchmark has nothing to compare
    loading with.
    """
    return comfy.sd.load_checkpoint_guess_config(path)


def load_stock_clip_vision(path: str):
    """What CLIPVisionLoader makes of a file.

    comfy/clip_vision.py:158 (load). See load_stock_checkpoint.
    """
    return comfy.clip_vision.load(path)
