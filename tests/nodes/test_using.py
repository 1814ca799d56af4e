"""What docs/using.md says of ComfyUI's own nodes beside ours: merging, and DDIM's eta."""

import types

import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import dynamic_vram
import pytest
import torch
from comfy_extras.nodes_custom_sampler import SamplerEulerAncestral
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeSimple, ModelSubtract

pytestmark = pytest.mark.slow

FIRST = "input_blocks.0.0.weight"  # the convolution that sees the mask and the masked photo
SIZES = {
    "image_size": 32,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 24,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_linear_in_transformer": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "dtype": torch.float32,
}

# Merging --------------------------------------------------------------------------------------


def unet(channels, seed):
    """A tiny MODEL of SD 1.5's kind with random weights."""
    config = comfy.supported_models.SD15({**SIZES, "in_channels": channels})
    config.manual_cast_dtype = None
    with dynamic_vram.ordinary_layers():
        model = config.get_model({})
    torch.manual_seed(seed)
    for weight in model.diffusion_model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def weights(model):
    """Of the U-Net, with everything that hangs on the MODEL applied."""
    model.patch_model()
    copies = {}
    for key, tensor in model.model.diffusion_model.state_dict().items():
        copies[key] = tensor.clone()
    model.unpatch_model()
    return copies


@pytest.fixture(scope="module")
def checkpoints():
    """SD 1.5, a custom checkpoint of it, and SD 1.5 inpainting, all tiny."""
    return types.SimpleNamespace(base=unet(4, 0), custom=unet(4, 1), inpainting=unet(9, 2))


def test_a_custom_checkpoint_becomes_one_for_inpainting(checkpoints):
    (difference,) = ModelSubtract().merge(checkpoints.inpainting, checkpoints.base, 1.0)
    (model,) = ModelAdd().merge(difference, checkpoints.custom)
    merged = weights(model)
    base, custom, inpainting = map(weights, vars(checkpoints).values())
    assert merged[FIRST].shape[1] == 9
    for key, tensor in merged.items():
        if key == FIRST:
            assert torch.equal(tensor, inpainting[key])
        else:
            expected = custom[key] + (inpainting[key] - base[key])
            assert torch.allclose(tensor, expected, atol=1e-6), key


def test_the_other_order_is_not_for_inpainting(checkpoints):
    (difference,) = ModelSubtract().merge(checkpoints.inpainting, checkpoints.base, 1.0)
    (model,) = ModelAdd().merge(checkpoints.custom, difference)
    assert weights(model)[FIRST].shape[1] == 4


def test_merging_keeps_the_adapter_of_the_first_model_only(models, apply, sample):
    plain = sample(models.model)
    (second,) = ModelMergeSimple().merge(models.model, apply(), 0.5)
    assert torch.equal(sample(second), plain)
    (first,) = ModelMergeSimple().merge(apply(), models.model, 0.5)
    assert torch.equal(sample(first), sample(apply()))
    assert not torch.equal(sample(first), plain)


# Noise between the steps ----------------------------------------------------------------------


class Guess:
    """Some model as a sampler of the host calls it."""

    def __init__(self, sampling):
        model = types.SimpleNamespace(model_sampling=sampling)
        self.inner_model = types.SimpleNamespace(inner_model=model)

    def __call__(self, x, sigma, **_):
        """Its guess at the picture."""
        return torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1) ** 2) ** 0.5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddims_eta_is_that_of_euler_ancestral(models, eta):
    """DDIM's equations 12 and 16 by hand, in DDIM's own scale, with the same noise."""
    guess = Guess(models.model.model.model_sampling)
    sigmas = torch.tensor([14.6, 7.0, 2.5, 0.9, 0.2])
    noises = torch.randn(len(sigmas), 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start = noises[-1] * sigmas[0]
    drawn = iter(noises)
    sampler = SamplerEulerAncestral.execute(eta, 1.0).args[0]
    found = sampler.sampler_function(
        guess, start, sigmas, noise_sampler=lambda *_: next(drawn), **sampler.extra_options
    )

    alphas = 1 / (1 + sigmas.double() ** 2)  # alphas_cumprod
    x = start.double() * alphas[0] ** 0.5
    for i in range(len(sigmas) - 1):
        before = alphas[i]
        after = alphas[i + 1]
        picture = guess((x / before**0.5).float(), sigmas[i : i + 1]).double()
        direction = (x - before**0.5 * picture) / (1 - before) ** 0.5
        spread = eta * ((1 - after) / (1 - before) * (1 - before / after)) ** 0.5
        x = after**0.5 * picture + (1 - after - spread**2) ** 0.5 * direction
        x = x + spread * noises[i].double()
    expected = x / alphas[-1] ** 0.5
    assert (found - expected).abs().max() < 1e-4
