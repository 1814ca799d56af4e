"""The photo and the mask as the U-Net gets them, and the official schedule."""

import comfy.sample
import comfy.samplers
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_images import RepeatImageBatch
from comfy_extras.nodes_mask import ImageCompositeMasked
from paths import GOLDENS
from PIL import Image
from safetensors.torch import load_file

from cat_diffusion.cat_core.pictures.tensors import channels_last
from cat_diffusion.nodes.conditioning import inpaint_conditioning, official_sigmas
from cat_diffusion.nodes.host import symbols
from cat_diffusion.nodes.wires import to_core
from nodes import InpaintModelConditioning

TEXT = [[torch.zeros(1, 77, 24), {}]]


@pytest.fixture(scope="session")
def condition(models):
    def condition(image, mask, fill="black", noise_mask=False, posterior_seed=None):
        return inpaint_conditioning(
            TEXT, TEXT, models.vae, image, mask, fill, noise_mask, posterior_seed
        )

    return condition


def values(conditioning):
    """What its first entry carries."""
    return conditioning[0][1]


def test_grey_equals_the_hosts_own_node(models, picture, condition):
    image, mask = picture
    stock = InpaintModelConditioning()
    for hole in (mask, torch.rand(1, 50, 30)):
        positive, negative, latent = condition(image, hole, "grey", True)
        expected = stock.encode(TEXT, TEXT, image, models.vae, hole, True)
        for name in ("concat_latent_image", "concat_mask"):
            assert torch.equal(values(positive)[name], values(expected[0])[name])
            assert torch.equal(values(negative)[name], values(expected[1])[name])
        for name in ("samples", "noise_mask"):
            assert torch.equal(latent[name], expected[2][name])


def test_black_fades_the_hole(models, picture, condition):
    image, mask = picture
    black = values(condition(image, mask)[0])["concat_latent_image"]
    grey = values(condition(image, mask, "grey")[0])["concat_latent_image"]
    expected = models.vae.encode(image * (1 - mask[..., None]))
    assert torch.allclose(black, expected, atol=1e-4)
    assert not torch.allclose(black, grey)


def posterior_of(vae, image):
    """Mean and deviation of what the VAE's own encoder tells of an IMAGE in [0, 1]."""
    network = vae.first_stage_model
    pixels = (2 * image - 1).movedim(-1, 1).to(vae.vae_dtype)
    mean, log_variance = network.quant_conv(network.encoder(pixels)).chunk(2, dim=1)
    return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))


def test_a_sample_is_mean_and_deviation_times_the_seeds_noise(models, picture, condition):
    image, mask = picture[0].repeat(2, 1, 1, 1), picture[1].round()
    mode = values(condition(image, mask)[0])["concat_latent_image"]
    drawn = values(condition(image, mask, posterior_seed=3)[0])["concat_latent_image"]
    mean, deviation = posterior_of(models.vae, image * (1 - mask[..., None]))
    generator = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for _ in mean])
    assert torch.allclose(mode, mean, atol=1e-4)
    assert torch.allclose(drawn, mean + deviation * noise, atol=1e-4)
    assert (drawn - mode).abs().mean() > 1e-3
    for seed, alike in ((3, True), (4, False)):
        again = values(condition(image, mask, posterior_seed=seed)[1])["concat_latent_image"]
        assert torch.equal(again, drawn) == alike
    # The mode is back, and one picture has the noise of the first of a batch.
    assert torch.equal(values(condition(image, mask)[0])["concat_latent_image"], mode)
    first = values(condition(image[:1], mask, posterior_seed=3)[0])["concat_latent_image"]
    assert torch.allclose(first, drawn[:1], atol=1e-4)


def test_what_has_no_posterior_to_sample_is_said(models, picture):
    class Preview:
        latent_channels = 4

        def __init__(self):
            self.first_stage_model = torch.nn.Identity()

    with (
        pytest.raises(ValueError, match=r"this VAE .Identity. has none to sample; expected SD"),
        symbols.sampled_posterior(Preview(), 1),
    ):
        pass
    with pytest.raises(ValueError, match=r"fill is grey.*Set fill to black, or posterior to mode"):
        inpaint_conditioning(TEXT, TEXT, models.vae, *picture, fill="grey", posterior_seed=1)


def test_the_latent_mask_is_the_official_one(condition):
    official = load_file(GOLDENS / "preproc.safetensors")["img1.mask_64"]
    mask = channels_last([Image.open(GOLDENS / "preproc/mask1.png").convert("L")])  # 512x512
    _, negative, _ = condition(torch.rand(1, 512, 512, 3), mask)
    assert torch.equal(values(negative)["concat_mask"][0, 0], official)


def test_positive_and_negative_are_both_set_and_the_input_is_left_alone(picture, condition):
    positive, negative, latent = condition(*picture)
    for conditioning in (positive, negative):
        assert {"concat_latent_image", "concat_mask"} <= set(values(conditioning))
    assert values(TEXT) == {}
    assert "noise_mask" not in latent
    assert "noise_mask" in condition(*picture, noise_mask=True)[2]


@pytest.mark.parametrize("height, width", [(64, 64), (65, 71), (8, 8), (15, 200), (63, 9)])
@pytest.mark.parametrize("fill", ["black", "grey"])
def test_any_size_is_cropped_as_the_host_does(models, condition, height, width, fill):
    image = torch.rand(1, height, width, 3)
    positive, _, latent = condition(image, torch.ones(1, 30, 40), fill, True)
    cells = (height // 8, width // 8)
    assert torch.equal(latent["samples"], models.vae.encode(image))  # the host's own crop
    assert latent["samples"].shape[-2:] == cells
    assert values(positive)["concat_latent_image"].shape[-2:] == cells
    if fill == "black":
        assert values(positive)["concat_mask"].shape[-2:] == cells
    assert latent["noise_mask"].shape[-2:] == (height // 8 * 8, width // 8 * 8)


@pytest.mark.parametrize("images, masks", [(3, 1), (1, 3), (3, 3)])
def test_batches(condition, sample, apply, picture, images, masks):
    image = picture[0].repeat(images, 1, 1, 1)
    mask = picture[1].repeat(masks, 1, 1)
    positive, negative, latent = condition(image, mask, noise_mask=True)
    assert len(latent["samples"]) == len(values(positive)["concat_mask"]) == 3
    assert len(sample(apply(), positive=positive, negative=negative, latent=latent, steps=1)) == 3


def test_more_masks_than_pictures_are_said(condition, picture, caplog):
    """The stock node at the end of the workflows pastes as many as it gets photos."""
    caplog.set_level("INFO")
    image, mask = picture
    condition(image, mask)
    condition(image.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1))
    assert not any("masks for one image" in line for line in caplog.messages)
    _, _, latent = condition(image, mask.repeat(2, 1, 1))
    assert len(latent["samples"]) == 2
    said = [line for line in caplog.messages if "2 masks for one image: 2 pictures" in line]
    assert len(said) == 1

    def pasted(photo):
        made = torch.rand(2, 64, 64, 3)
        return ImageCompositeMasked.execute(photo, made, 0, 0, False, mask).args[0]

    assert len(pasted(image)) == 1
    (repeated,) = RepeatImageBatch.execute(image, 2).args
    assert len(pasted(repeated)) == 2


def decoded(mask, folder, monkeypatch):
    """A mask as the host reads it from an 8-bit grey PNG."""
    Image.fromarray((mask[0] * 255).byte().numpy()).save(folder / "mask.png")
    monkeypatch.setattr(folder_paths, "input_directory", str(folder))
    return symbols.run_stock_node("LoadImageMask", image="mask.png", channel="red")[0]


def test_black_and_white_are_so_after_decoding(condition, picture, tmp_path, monkeypatch):
    """The hole is as black as with the mask that was drawn, and nothing shines through."""
    image, mask = picture
    drawn = mask.round()
    read = decoded(drawn, tmp_path, monkeypatch)
    assert (read - drawn).abs().max() <= 1 / 255
    for mask_read, mask_drawn in ((read, drawn), (1 - read, 1 - drawn)):
        for fill in ("black", "grey"):
            found = condition(image, mask_read, fill, noise_mask=True)
            expected = condition(image, mask_drawn, fill, noise_mask=True)
            for name in ("concat_latent_image", "concat_mask"):
                assert torch.equal(values(found[0])[name], values(expected[0])[name])
            assert torch.equal(found[2]["noise_mask"], expected[2]["noise_mask"])


WHITE = 254.008 / 255  # as the host reads it
BLACK = 1 - WHITE  # inverted


@pytest.mark.parametrize(
    "row, expected",
    [
        ([0, WHITE], [0, 1]),
        ([BLACK, 1], [0, 1]),
        ([BLACK, BLACK], [0, 0]),
        ([1 / 255, 254 / 255], [0, 1]),
        ([0, 0.5, WHITE], [0, 0.5, WHITE]),
        ([2 / 255, 1], [2 / 255, 1]),
        ([0, 253 / 255], [0, 253 / 255]),
    ],
)
def test_only_masks_of_two_values_are_mended(picture, row, expected):
    """Each mask of a batch for itself."""
    soft = torch.linspace(0, WHITE, len(row)).view(1, 1, -1)
    masks = torch.cat((torch.tensor(row).view(1, 1, -1), soft))
    _, core = to_core(picture[0], masks)
    assert torch.equal(core[0].flatten(), torch.tensor(expected).float())
    if len(row) > 2:
        assert torch.equal(core[1].flatten(), soft.flatten())


def test_mismatched_batches_are_refused(condition, picture):
    with pytest.raises(ValueError, match="2 images and 3 masks"):
        condition(picture[0].repeat(2, 1, 1, 1), picture[1].repeat(3, 1, 1))


# The schedule ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def schedule(models):
    def schedule(steps, denoise=1.0):
        return official_sigmas(models.model, steps, denoise)

    return schedule


@pytest.mark.parametrize("steps", [5, 50])
def test_the_schedule_is_the_official_one(schedule, steps):
    goldens = load_file(GOLDENS / "ddim.safetensors")
    last = goldens[f"ddim{steps}.alphas_prev"][:1].float()
    alphas = torch.cat((last, goldens[f"ddim{steps}.alphas"]))
    assert torch.allclose(1 / (1 + schedule(steps) ** 2), alphas.flip(0), rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 333, 999, 1000])
def test_odd_step_counts_follow_the_official_stride(schedule, steps):
    sigmas = schedule(steps)
    timesteps = np.arange(1, 1001, 1000 // steps)
    official = (timesteps < 1000).sum()
    assert len(sigmas) == official + 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] > 0


def test_denoise_takes_the_end_of_a_longer_schedule(schedule):
    assert torch.equal(schedule(10, 0.5), schedule(20)[-11:])
    assert len(schedule(10, 0.0)) == 0
    whole = schedule(1000)
    assert schedule(1000, 0.5)[0] < whole[len(whole) // 2 - 2]


def test_the_schedule_runs_in_the_hosts_custom_sampler(schedule, apply, conditioned):
    positive, negative, latent = conditioned
    out = comfy.sample.sample_custom(
        apply(),
        torch.randn(latent["samples"].shape),
        7.5,
        comfy.samplers.sampler_object("ddim"),
        schedule(4),
        positive,
        negative,
        latent["samples"] * 0,
        disable_pbar=True,
        seed=1,
    )
    assert out.shape == latent["samples"].shape
    assert out.isfinite().all()
