"""The photo and the mask as the U-Net gets them, and the official schedule."""

import pytest
import torch
from paths import GOLDENS
from safetensors.torch import load_file

TEXT = [[torch.zeros(1, 77, 24), {}]]


@pytest.fixture(scope="session")
def condition(models):
    from cat_diffusion.nodes.conditioning import CATInpaintConditioning

    def condition(image, mask, fill="black", noise_mask=False):
        return CATInpaintConditioning.execute(
            TEXT, TEXT, models.vae, image, mask, fill, noise_mask
        ).args

    return condition


def test_grey_equals_the_hosts_own_node(models, picture, condition):
    import nodes

    for mask in (picture[1], torch.rand(1, 50, 30)):
        ours = condition(picture[0], mask, "grey", True)
        theirs = nodes.InpaintModelConditioning().encode(
            TEXT, TEXT, picture[0], models.vae, mask, True
        )
        for i in range(2):
            for name in ("concat_latent_image", "concat_mask"):
                assert torch.equal(ours[i][0][1][name], theirs[i][0][1][name])
        assert torch.equal(ours[2]["samples"], theirs[2]["samples"])
        assert torch.equal(ours[2]["noise_mask"], theirs[2]["noise_mask"])


def test_black_fades_the_hole(models, picture, condition):
    values = condition(*picture)[0][0][1]
    expected = models.vae.encode(picture[0] * (1 - picture[1][..., None]))
    assert torch.allclose(values["concat_latent_image"], expected, atol=1e-4)
    assert not torch.allclose(
        values["concat_latent_image"], condition(*picture, "grey")[0][0][1]["concat_latent_image"]
    )


def test_the_latent_mask_is_the_official_one(condition):
    import numpy as np
    from PIL import Image

    goldens = load_file(GOLDENS / "preproc.safetensors")
    mask = (
        torch.from_numpy(np.array(Image.open(GOLDENS / "preproc/mask1.png").convert("L")))[None]
        / 255
    )  # 512x512
    values = condition(torch.rand(1, 512, 512, 3), mask)[1][0][1]
    assert torch.equal(values["concat_mask"][0, 0], goldens["img1.mask_64"])


def test_positive_and_negative_are_both_set_and_the_input_is_left_alone(picture, condition):
    positive, negative, latent = condition(*picture)
    for conditioning in (positive, negative):
        assert {"concat_latent_image", "concat_mask"} <= set(conditioning[0][1])
    assert TEXT[0][1] == {}
    assert "noise_mask" not in latent and "noise_mask" in condition(*picture, noise_mask=True)[2]


@pytest.mark.parametrize("height, width", [(64, 64), (65, 71), (8, 8), (15, 200), (63, 9)])
@pytest.mark.parametrize("fill", ["black", "grey"])
def test_any_size_is_cropped_as_the_host_does(models, condition, height, width, fill):
    image, mask = torch.rand(1, height, width, 3), torch.ones(1, 30, 40)
    positive, _, latent = condition(image, mask, fill, True)
    assert torch.equal(latent["samples"], models.vae.encode(image))  # the host's own crop
    assert latent["samples"].shape[-2:] == (height // 8, width // 8)
    assert positive[0][1]["concat_latent_image"].shape[-2:] == (height // 8, width // 8)
    if fill == "black":
        assert positive[0][1]["concat_mask"].shape[-2:] == (height // 8, width // 8)
    assert latent["noise_mask"].shape[-2:] == (height // 8 * 8, width // 8 * 8)


@pytest.mark.parametrize("images, masks", [(3, 1), (1, 3), (3, 3)])
def test_batches(condition, sample, apply, picture, images, masks):
    positive, negative, latent = condition(
        picture[0].repeat(images, 1, 1, 1), picture[1].repeat(masks, 1, 1), noise_mask=True
    )
    assert len(latent["samples"]) == len(positive[0][1]["concat_mask"]) == 3
    assert len(sample(apply(), positive=positive, negative=negative, latent=latent, steps=1)) == 3


def test_mismatched_batches_are_refused(condition, picture):
    with pytest.raises(ValueError, match="2 images and 3 masks"):
        condition(picture[0].repeat(2, 1, 1, 1), picture[1].repeat(3, 1, 1))


@pytest.fixture(scope="session")
def schedule(models):
    from cat_diffusion.nodes.conditioning import CATScheduler

    return lambda steps, denoise=1.0, model=None: CATScheduler.execute(
        model or models.model, steps, denoise
    ).args[0]


@pytest.mark.parametrize("steps", [5, 50])
def test_the_schedule_is_the_official_one(schedule, steps):
    goldens = load_file(GOLDENS / "ddim.safetensors")
    alphas = torch.cat(
        (goldens[f"ddim{steps}.alphas_prev"][:1].float(), goldens[f"ddim{steps}.alphas"])
    )
    assert torch.allclose(1 / (1 + schedule(steps) ** 2), alphas.flip(0), rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 333, 999, 1000])
def test_odd_step_counts_follow_the_official_stride(schedule, steps):
    sigmas = schedule(steps)
    official = len([t for t in range(1, 1001, 1000 // steps) if t < 1000])
    assert len(sigmas) == official + 1 and (sigmas.diff() < 0).all() and sigmas[-1] > 0


def test_denoise_takes_the_end_of_a_longer_schedule(schedule):
    assert torch.equal(schedule(10, 0.5), schedule(20)[-11:])
    assert len(schedule(10, 0.0)) == 0
    assert schedule(1000, 0.5)[0] < schedule(1000)[len(schedule(1000)) // 2 - 2]


def test_the_schedule_runs_in_the_hosts_custom_sampler(schedule, apply, conditioned):
    import comfy.sample
    import comfy.samplers

    latent = conditioned[2]["samples"]
    out = comfy.sample.sample_custom(
        apply(),
        torch.randn(latent.shape),
        7.5,
        comfy.samplers.sampler_object("ddim"),
        schedule(4),
        conditioned[0],
        conditioned[1],
        latent * 0,
        disable_pbar=True,
        seed=1,
    )
    assert out.shape == latent.shape and out.isfinite().all()
