"""CATCropAroundMask and CATStitch: shapes and sentences of the nodes, a picture through both."""

import logging

import pytest
import torch

from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.crop_and_stitch import CATCropAroundMask, CATStitch


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def hole(left, top, right, bottom, height=150, width=203):
    """MASK (1, H, W) with a white box."""
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = 1
    return mask


@pytest.fixture
def photo():
    """IMAGE (1, 150, 203, 3) of noise."""
    return noise(1, 150, 203, 3)


@pytest.fixture
def said(caplog):
    """The sentences that the nodes say from here on."""
    caplog.set_level(logging.INFO)

    def said():
        sentences = caplog.messages
        caplog.clear()
        return sentences

    return said


def cut(image, mask, size=64, context=1.5):
    """The node's outputs: image, mask, crop."""
    return CATCropAroundMask.execute(image, mask, size, context).args


def put_back(crop, image, soft_edge=0):
    """The node's output."""
    (stitched,) = CATStitch.execute(crop, image, soft_edge).args
    return stitched


def test_the_defaults_are_those_of_sd15():
    inputs = CATCropAroundMask.GET_NODE_INFO_V1()["input"]["required"]
    assert inputs["size"][1]["default"] == 512
    assert (inputs["size"][1]["min"], inputs["size"][1]["max"]) == (64, 2048)
    assert inputs["size"][1]["step"] == 8
    assert inputs["context"][1]["default"] == 1.5
    assert (inputs["context"][1]["min"], inputs["context"][1]["max"]) == (1, 8)
    soft_edge = CATStitch.GET_NODE_INFO_V1()["input"]["required"]["soft_edge"][1]
    assert (soft_edge["default"], soft_edge["min"], soft_edge["max"]) == (8, 0, 256)


def test_a_small_hole_is_cut_and_put_back_to_the_bit(photo):
    mask = hole(100, 70, 120, 80)
    image_64, mask_64, crop = cut(photo, mask)
    assert torch.equal(image_64, photo[:, 43:107, 78:142])
    assert torch.equal(mask_64, mask[:, 43:107, 78:142])
    drawn = noise(1, 64, 64, 3, seed=1)
    stitched = put_back(crop, drawn)
    expected = photo.clone()
    expected[:, 70:80, 100:120] = drawn[:, 27:37, 22:42]
    assert torch.equal(stitched, expected)


@pytest.mark.parametrize("soft_edge", [0, 8])
def test_a_large_hole_is_scaled_and_the_photo_stays(photo, soft_edge):
    mask = hole(30, 20, 140, 120)
    image_64, mask_64, crop = cut(photo, mask)
    assert image_64.shape == (1, 64, 64, 3)
    assert mask_64.shape == (1, 64, 64)
    assert mask_64.unique().tolist() == [0, 1]
    stitched = put_back(crop, 1 - image_64, soft_edge)
    assert stitched.shape == photo.shape
    near = hole(30 - soft_edge, 20 - soft_edge, 140 + soft_edge, 120 + soft_edge) == 1
    assert torch.equal(stitched[~near], photo[~near])
    assert not torch.allclose(stitched[mask == 1], photo[mask == 1], atol=0.1)


@pytest.mark.parametrize("height, width", [(1, 1), (20, 31), (9, 300), (300, 9), (65, 71)])
def test_photos_of_any_size(height, width):
    photo = noise(1, height, width, 3)
    mask = (noise(1, height, width, seed=1) > 0.5).float()
    mask[:, 0, 0] = 1
    image_64, mask_64, crop = cut(photo, mask)
    assert image_64.shape == (1, 64, 64, 3)
    assert mask_64.shape == (1, 64, 64)
    stitched = put_back(crop, torch.zeros(1, 64, 64, 3))
    assert torch.equal(stitched, photo * (1 - mask)[..., None])


# Batches --------------------------------------------------------------------------------------


def test_each_photo_has_its_square(photo):
    photos = torch.cat((photo, noise(1, 150, 203, 3, seed=1)))
    masks = torch.cat((hole(0, 0, 9, 9), hole(30, 20, 140, 120)))
    together = cut(photos, masks)
    drawn = noise(2, 64, 64, 3, seed=2)
    stitched = put_back(together[2], drawn, 8)
    for i in range(2):
        alone = cut(photos[i : i + 1], masks[i : i + 1])
        assert torch.equal(together[0][i], alone[0][0])
        assert torch.equal(together[1][i], alone[1][0])
        assert torch.equal(stitched[i], put_back(alone[2], drawn[i : i + 1], 8)[0])


def test_one_mask_serves_all_photos_and_a_photo_with_many_masks_is_repeated(photo):
    photos = noise(3, 150, 203, 3)
    mask = hole(100, 70, 120, 80)
    image_64, mask_64, crop = cut(photos, mask)
    assert torch.equal(image_64, photos[:, 43:107, 78:142])
    assert torch.equal(mask_64, mask[:, 43:107, 78:142].expand(3, -1, -1))
    assert len(put_back(crop, image_64)) == 3

    masks = torch.cat((mask, hole(0, 0, 9, 9)))
    image_64, mask_64, crop = cut(photo, masks)
    assert torch.equal(image_64[1], photo[0, :64, :64])
    stitched = put_back(crop, torch.ones(2, 64, 64, 3))
    assert torch.equal((stitched == 1).all(3), masks == 1)


def test_several_results_for_one_photo(photo):
    mask = hole(100, 70, 120, 80)
    _, _, crop = cut(photo, mask)
    drawn = noise(4, 64, 64, 3, seed=1)
    stitched = put_back(crop, drawn, 8)
    assert len(stitched) == 4
    for i in range(4):
        assert torch.equal(stitched[i : i + 1], put_back(crop, drawn[i : i + 1], 8))


def test_several_results_for_each_of_two_photos_come_as_the_host_repeats_latents():
    photos = noise(2, 150, 203, 3)
    image_64, _, crop = cut(photos, hole(100, 70, 120, 80))
    stitched = put_back(crop, image_64.repeat(2, 1, 1, 1))
    assert torch.equal(stitched, photos.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("photos, results", [(2, 1), (2, 3), (3, 2)])
def test_results_of_another_batch_are_refused(photos, results):
    _, _, crop = cut(noise(photos, 150, 203, 3), hole(100, 70, 120, 80))
    sentence = f"The crop holds {photos} photos, here are {results} images"
    with pytest.raises(ValueError, match=sentence):
        put_back(crop, torch.zeros(results, 64, 64, 3))


def test_mismatched_batches_of_photos_and_masks_are_refused():
    with pytest.raises(ValueError, match="2 images and 3 masks"):
        cut(noise(2, 150, 203, 3), hole(0, 0, 9, 9).repeat(3, 1, 1))


# What is odd ----------------------------------------------------------------------------------


def test_an_empty_mask_is_said_and_goes_on(photo, said):
    image_64, mask_64, crop = cut(photo, hole(0, 0, 0, 0))
    sentence = "The mask is empty: the square is the middle of the photo. Paint a mask."
    assert said() == [f"CAT-Diffusion: {sentence}"]
    assert torch.equal(image_64, photo[:, 43:107, 69:133])
    assert not mask_64.any()
    assert torch.equal(put_back(crop, torch.zeros(1, 64, 64, 3), 8), photo)
    cut(photo, torch.cat((hole(0, 0, 0, 0), hole(0, 0, 9, 9))))
    assert "The mask of 1 of 2 pictures is empty: " in said()[0]
    cut(photo, hole(0, 0, 9, 9))
    assert said() == []


def test_alpha_is_dropped(photo):
    with_alpha = torch.cat((photo, noise(1, 150, 203, 1)), dim=3)
    mask = hole(100, 70, 120, 80)
    image_64, _, crop = cut(with_alpha, mask)
    assert torch.equal(image_64, cut(photo, mask)[0])
    drawn = noise(1, 64, 64, 4)
    assert torch.equal(put_back(crop, drawn), put_back(crop, drawn[..., :3]))


def test_what_is_no_picture_is_explained(photo):
    mask = hole(0, 0, 9, 9)
    _, _, crop = cut(photo, mask)
    with pytest.raises(ValueError, match="Connect an IMAGE"):
        cut(photo[..., :2], mask)
    with pytest.raises(ValueError, match="Connect an IMAGE"):
        put_back(crop, noise(1, 64, 64, 1))
    with pytest.raises(ValueError, match="contains NaN or Inf"):
        put_back(crop, torch.full((1, 64, 64, 3), torch.nan))


@pytest.mark.parametrize("size, proposed", [(500, 496), (77, 72)])
def test_a_size_that_the_vae_would_cut_is_refused(photo, size, proposed):
    """A link brings any number."""
    with pytest.raises(ValueError, match=f"The size is {size}; .* Take {proposed}, or 512"):
        cut(photo, hole(0, 0, 9, 9), size)


@pytest.mark.parametrize("size", [4, -8, 4096, 64.5, float("nan"), None])
def test_a_size_out_of_range_is_refused(photo, size):
    with pytest.raises(ValueError, match=r"size is .*; expected a whole number from 64 to 2048"):
        cut(photo, hole(0, 0, 9, 9), size)


def test_a_result_that_is_no_square_is_said(photo, said):
    _, _, crop = cut(photo, hole(100, 70, 120, 80))
    assert put_back(crop, torch.ones(1, 64, 128, 3)).shape == photo.shape
    assert "The image is 128x64 pixels and is squeezed into a square." in said()[0]
    put_back(crop, torch.ones(1, 128, 128, 3))
    assert said() == []


# With a model ---------------------------------------------------------------------------------


def test_a_picture_drawn_by_the_sampler(models, sample, apply, conditioned, photo):
    mask = hole(100, 70, 120, 80)
    image_64, mask_64, crop = cut(photo, mask)
    text = conditioned[0], conditioned[1]
    positive, negative, latent = inpaint_conditioning(*text, models.vae, image_64, mask_64)
    latent["samples"] = latent["samples"].repeat(2, 1, 1, 1)
    sampled = sample(apply(), positive=positive, negative=negative, latent=latent, steps=1)
    stitched = put_back(crop, models.vae.decode(sampled))
    assert stitched.shape == (2, 150, 203, 3)
    outside = mask[0] == 0
    assert torch.equal(stitched[:, outside], photo.expand(2, -1, -1, -1)[:, outside])
    assert not torch.equal(stitched[0], stitched[1])
