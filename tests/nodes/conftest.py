"""Tiny models in the host's own classes, and its own sampler, in this process."""

import dataclasses

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import dynamic_vram
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as stock

from cat_diffusion.cat_core.weights import Checkpoint
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import model_files, symbols
from cat_diffusion.nodes.host.build import (
    build_cat_model,
    build_clip,
    build_clip_vision,
    build_unet,
    build_vae,
)
from cat_diffusion.nodes.host.cat_model import CatModel
from cat_diffusion.nodes.host.unet import block_name
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


@pytest.fixture(scope="session")
def prompts(models, conditioned):
    """CONDITIONINGs by name, each of its own text and with the photo that is to be inpainted."""

    def encode(text):
        encoded = models.clip.encode_from_tokens_scheduled(models.clip.tokenize(text))
        photo = {
            name: conditioned[0][0][1][name] for name in ("concat_latent_image", "concat_mask")
        }
        return symbols.with_values(encoded, photo)

    with torch.inference_mode():
        texts = {"positive": "spoon", "other": "a tree", "negative": "blurred", "empty": ""}
        return {name: encode(text) for name, text in texts.items()}


@pytest.fixture(scope="session")
def run(conditioned):
    """SamplerCustomAdvanced with a guider; returns the latent."""

    def run(guider, steps=1, latent=None, seed=1, sampler="euler", scheduler="normal"):
        (noise,) = stock.RandomNoise.execute(seed).args
        (method,) = stock.KSamplerSelect.execute(sampler).args
        (sigmas,) = stock.BasicScheduler.execute(guider.model_patcher, scheduler, steps, 1.0).args
        latent = latent or conditioned[2]
        out = stock.SamplerCustomAdvanced.execute(noise, guider, method, sigmas, latent)
        return out.args[0]["samples"]

    return run


class OraclePatch(symbols.Patch):
    """The adapter unfolded, for rows told apart by what they read: their encoded text.

    Args:
        texts: (77, T) each; a row that reads the i-th looks at prompt i modulo P, any other at
            zeros.
    """

    def __init__(self, adapter, tokens, texts):
        self.adapter = adapter
        self.tokens = tokens
        self.texts = texts

    def __call__(self, x, extra_options):
        seen = torch.stack([self._seen(text) for text in extra_options["texts_of_rows"]])
        return x + self.adapter.block(block_name(extra_options))(x, seen)

    def _seen(self, text):
        for i, looks in enumerate(self.texts):
            if torch.equal(looks, text):
                return self.tokens[i % len(self.tokens)]
        return torch.zeros_like(self.tokens[0])


def show_texts(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
    """Tell patches what each row reads."""
    options = {**transformer_options, "texts_of_rows": context}
    return executor(x, timesteps, context, y, control, options, **kwargs)


@pytest.fixture
def oracle(models, prompt):
    """A model with OraclePatch."""

    def oracle(*conditionings, visual_prompt=prompt, model=models.model):
        texts = [text for conditioning in conditionings for text in conditioning[0][0]]
        patched = model.clone()
        patch = OraclePatch(models.cat_model.ref_adapter.model, visual_prompt.tokens, texts)
        symbols.add_middle_patch(patched, patch)
        patched.add_wrapper(WrappersMP.DIFFUSION_MODEL, show_texts)
        return patched

    return oracle


@pytest.fixture
def control_net():
    """A small ControlNet of the host's class with random weights."""
    torch.manual_seed(4)
    with dynamic_vram.ordinary_layers():
        network = comfy.cldm.cldm.ControlNet(
            image_size=32,
            in_channels=4,
            model_channels=32,
            hint_channels=3,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            transformer_depth=[1, 1],
            transformer_depth_middle=1,
            num_heads=4,
            use_spatial_transformer=True,
            context_dim=24,
            legacy=False,
            operations=comfy.ops.manual_cast,
        )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return comfy.controlnet.ControlNet(
        network, load_device=comfy.model_management.get_torch_device()
    )
