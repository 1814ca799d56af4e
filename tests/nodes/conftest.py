"""Tiny models in the host's own classes, and its own sampler, in this process."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.host.build import (
    build_cat_model,
    build_clip,
    build_clip_vision,
    build_unet,
    build_vae,
)


@pytest.fixture(autouse=True)
def no_gradients():
    """As the host executes nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def models(tiny_file):
    """Everything that CATLoadCheckpoint makes of the tiny checkpoint."""
    with torch.inference_mode():
        file = model_files.read_path(tiny_file)
        return SimpleNamespace(
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
    image = torch.stack(
        (ramp.expand(64, 64), ramp.expand(64, 64).T, (ramp * 9).sin().abs().expand(64, 64)), dim=-1
    )
    mask = torch.zeros(64, 64)
    mask[20:50, 10:40], mask[24:46, 14:36] = 0.4, 1.0
    return ((image * 255).round() / 255)[None], mask[None]


@pytest.fixture(scope="session")
def prompt(pack, models, picture):
    """VISUAL_PROMPT of the picture."""
    from cat_diffusion.nodes.visual_prompt import CATSemanticInpaint

    with torch.inference_mode():
        return CATSemanticInpaint.execute(
            models.cat_model, models.clip_vision, models.clip, *picture, "spoon"
        ).args[0]


@pytest.fixture(scope="session")
def conditioned(pack, models, picture):
    """(positive, negative, latent) of the picture, from stock text encoding and the pack's conditioning."""
    from cat_diffusion.nodes.conditioning import CATInpaintConditioning

    with torch.inference_mode():
        texts = [
            models.clip.encode_from_tokens_scheduled(models.clip.tokenize(text))
            for text in ("spoon", "")
        ]
        return CATInpaintConditioning.execute(*texts, models.vae, *picture, "black", False).args


@pytest.fixture(scope="session")
def apply(pack, models, prompt):
    """CATApplyRefAdapter with everything filled in."""
    from cat_diffusion.nodes.apply_ref_adapter import CATApplyRefAdapter

    def apply(model=None, visual_prompt=None, strength=1.0, start=0.0, end=1.0, cat_model=None):
        return CATApplyRefAdapter.execute(
            model or models.model,
            cat_model or models.cat_model,
            visual_prompt or prompt,
            strength,
            start,
            end,
        ).args[0]

    return apply


@pytest.fixture(scope="session")
def sample(pack, conditioned):
    """The host's own KSampler function; returns the latent."""
    import nodes

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
        return nodes.common_ksampler(
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
        )[0]["samples"]

    return sample


@pytest.fixture(scope="session")
def stack(prompt):
    """Make one visual prompt of several by scaling the tokens."""

    def stack(*factors):
        grow = {
            name: torch.cat([getattr(prompt, name) * factor for factor in factors])
            for name in ("tokens", "before", "after")
        }
        return dataclasses.replace(
            prompt, **grow, patch_mask=prompt.patch_mask.repeat(len(factors), 1, 1, 1)
        )

    return stack
