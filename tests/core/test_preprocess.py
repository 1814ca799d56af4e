"""Preprocessing beyond the golden arrays: batches, sizes, soft and hard masks."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.pictures import tensors


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (512, 512), (333, 1001)])
def test_any_size_gives_the_same_shapes(size):
    seen = preprocess.clip_input(noise(2, 3, *size), noise(2, 1, 50, 40))
    assert seen.image.shape == seen.masked_image.shape == (2, 3, 224, 224)
    assert seen.patch_mask.shape == (2, 1, 16, 16)
    assert seen.image.dtype == torch.uint8


def test_one_image_with_many_masks_and_the_reverse_equal_single_runs():
    images = noise(3, 3, 60, 80)
    masks = (noise(3, 1, 60, 80, seed=1) > 0.9).float()
    many_masks = preprocess.clip_input(images[:1], masks)
    many_images = preprocess.clip_input(images, masks[:1])
    for many in (many_masks, many_images):
        assert len(many.masked_image) == len(many.patch_mask) == len(many.image) == 3
    for i in range(3):
        single = preprocess.clip_input(images[:1], masks[i : i + 1])
        assert torch.equal(many_masks.masked_image[i : i + 1], single.masked_image)
        single = preprocess.clip_input(images[i : i + 1], masks[:1])
        assert torch.equal(many_images.masked_image[i : i + 1], single.masked_image)


def test_without_a_mask_nothing_is_hidden():
    seen = preprocess.clip_input(noise(1, 3, 64, 64))
    assert torch.equal(seen.image, seen.masked_image)
    assert not seen.patch_mask.any()


def test_a_full_mask_hides_everything_behind_grey():
    seen = preprocess.clip_input(noise(1, 3, 64, 64), torch.ones(1, 1, 9, 9))
    assert (seen.masked_image == preprocess.GREY).all()
    assert seen.patch_mask.all()


def test_one_pixel_masks_its_patch_only():
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 14 * 3 : 14 * 3 + 14, 14 * 5 : 14 * 5 + 14] = 1
    patch_mask = preprocess.clip_input(noise(1, 3, 224, 224), mask).patch_mask
    assert patch_mask[0, 0].nonzero().tolist() == [[3, 5]]


def test_vae_input_fades_to_black():
    image = torch.full((1, 3, 8, 8), 1.0)
    mask = torch.full((1, 1, 8, 8), 0.4)
    faded = torch.tensor(2 * (1 - 102 / 255) - 1, dtype=torch.double)
    assert torch.allclose(preprocess.vae_input(image, mask), faded)
    assert (preprocess.vae_input(image, torch.ones(1, 1, 8, 8)) == -1).all()


def test_clip_pixel_values_equal_the_official_processor():
    pixels = preprocess.clip_input(noise(1, 3, 100, 120)).image
    processed = CLIPImageProcessor()(pixels[0].permute(1, 2, 0).numpy(), return_tensors="pt")
    official = torch.as_tensor(processed["pixel_values"])
    assert torch.allclose(preprocess.clip_normalise(pixels), official, atol=1e-6)


def test_levels_of_8_bits_survive_the_way_to_tensors_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.stack((levels, levels.T, 255 - levels), axis=2)
    for array in (levels, colours):
        picture = Image.fromarray(array)
        image = tensors.channels_last([picture])
        assert np.array_equal(tensors.to_picture(image[0]), array)
        planes = tensors.channels_first(picture)
        assert torch.equal(planes.movedim(1, -1), image.reshape(1, 16, 16, -1))
    assert tensors.to_levels(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]
