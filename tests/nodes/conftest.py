"""Tiny models in the host's own classes, and its own sampler, in this process."""

import dataclasses

import pytest
import torch

from cat_diffusion.cat_core.weights import Checkpoint
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.host.build import (
    build_cat_model,
    build_clip,
    build_clip_vision,
    build_unet,
    build_vae,
)
from cat_diffusion.nodes.host.cat_model import CatModel
from cat_diffusion.nodes.visual_prompt import predict
from nodes import common_ksampler


@dataclasses.dataclass
class TinyModels:
    """Everything that CATLoadCheckpoint makes of the tiny checkpoint, and its file."""

    file: Checkpoint
    model: object
    clip: object
    vae: object
    clip_vision: object
    cat_model: CatModel


@pytest.fixture(autouse=True)
def no_gradients():
    """As the host executes nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def models(tiny_file):
    with torch.inference_mode():
        file = model_files.read_path(tiny_file)
        return TinyModels(
            file=file,
            model=build_unet(file),
            clip=build_clip(file),
            vae=build_vae(file),
            clip_vision=build_clip_vision(file),
            cat_model=build_cat_model(file),
        )


@pytest.fixture(scope="session")
def picture():
    """IMAGE (1, 64, 64, 3) of smooth colours and MASK (1, 64, 64) with a soft-edged box."""
    ramp = torch.linspace(0, 1, 64)
    red = ramp.expand(64, 64)
    blue = (ramp * 9).sin().abs().expand(64, 64)
    image = torch.stack((red, red.T, blue), dim=-1)
    mask = torch.zeros(64, 64)
    mask[20:50, 10:40] = 0.4
    mask[24:46, 14:36] = 1.0
    return ((image * 255).round() / 255)[None], mask[None]


@pytest.fixture(scope="session")
def prompt(models, picture):
    """VISUAL_PROMPT of the picture."""
    with torch.inference_mode():
        return predict(models.cat_model, models.clip_vision, models.clip, *picture, "spoon")


@pytest.fixture(scope="session")
def conditioned(models, picture):
    """(positive, negative, latent): stock text encoding and the pack's conditioning."""

    def encode(text):
        return models.clip.encode_from_tokens_scheduled(models.clip.tokenize(text))

    with torch.inference_mode():
        return inpaint_conditioning(encode("spoon"), encode(""), models.vae, *picture)


@pytest.fixture(scope="session")
def apply(models, prompt):
    """apply_ref_adapter with everything filled in."""

    def apply(model=None, visual_prompt=None, strength=1.0, start=0.0, end=1.0, cat_model=None):
        return apply_ref_adapter(
            model or models.model,
            cat_model or models.cat_model,
            visual_prompt or prompt,
            strength,
            start,
            end,
        )

    return apply


@pytest.fixture(scope="session")
def sample(conditioned):
    """The host's own KSampler function; returns the latent."""

    def sample(
        model,
        seed=1,
        steps=3,
        cfg=7.5,
        sampler="ddim",
        scheduler="ddim_uniform",
        denoise=1.0,
        latent=None,
        positive=None,
        negative=None,
    ):
        (sampled,) = common_ksampler(
            model,
            seed,
            steps,
            cfg,
            sampler,
            scheduler,
            positive or conditioned[0],
            negative or conditioned[1],
            latent or conditioned[2],
            denoise,
        )
        return sampled["samples"]

    return sample


@pytest.fixture(scope="session")
def stack(prompt):
    """Make one visual prompt of several by scaling the tokens."""

    def stack(*factors):
        return dataclasses.replace(
            prompt,
            tokens=torch.cat([prompt.tokens * factor for factor in factors]),
            before=torch.cat([prompt.before * factor for factor in factors]),
            after=torch.cat([prompt.after * factor for factor in factors]),
            patch_mask=prompt.patch_mask.repeat(len(factors), 1, 1, 1),
        )

    return stack
