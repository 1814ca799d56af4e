"""CATCompareFeatures: the numbers are those of the features themselves."""

import numpy as np
import pytest
import torch

from cat_diffusion.cat_core.models.sem_inpainter import SemInpainterOutput
from cat_diffusion.nodes import visual_prompt
from cat_diffusion.nodes.compare import CATCompareFeatures
from cat_diffusion.nodes.host.cat_model import CatModel
from cat_diffusion.nodes.visual_prompt import encode_visual_prompt


@pytest.fixture
def compare(models):
    """The node's outputs: observed, predicted, histogram."""

    def compare(image, mask, cat_model=None, text="spoon"):
        return CATCompareFeatures.execute(
            cat_model or models.cat_model, models.clip_vision, models.clip, image, mask, text
        ).args

    return compare


@pytest.fixture
def truth(models, picture):
    """Features of the whole picture (1, N, D)."""
    return encode_visual_prompt(models.clip_vision, picture[0]).before


def cosine(a, b):
    """By hand, in float64."""
    a = a.double().numpy()
    b = b.double().numpy()
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_the_numbers_are_mean_cosines_in_the_hole(compare, truth, picture, prompt):
    observed, predicted, histogram = compare(*picture)
    hole = prompt.patch_mask.flatten().bool().numpy()
    assert 0 < hole.sum() < 256
    for found, features in ((observed, prompt.before), (predicted, prompt.after)):
        assert found == pytest.approx(cosine(features[0], truth[0])[hole].mean(), abs=1e-5)
    assert histogram.shape == (1, 320, 640, 3)
    assert 0 <= histogram.min() < histogram.max() <= 1


def test_a_perfect_prediction_is_1(compare, truth, picture, monkeypatch):
    perfect = SemInpainterOutput(patches=truth, image=truth[:, 0], label=truth[:, 0])
    monkeypatch.setattr(visual_prompt, "run_sem_inpainter", lambda *_: perfect)
    observed, predicted, _ = compare(*picture)
    assert predicted == pytest.approx(1, abs=1e-5)
    assert observed < 0.99


def test_a_batch_is_the_mean_of_its_pictures(compare, picture):
    image, mask = picture
    images = torch.cat([image, image.flip(2), image * 0.5])
    masks = torch.cat([mask, mask.flip(1), mask])

    def mean_of_single_runs(images):
        single = [compare(images[i : i + 1], masks[i : i + 1])[:2] for i in range(3)]
        return np.mean(single, axis=0)

    assert compare(images, masks)[:2] == pytest.approx(mean_of_single_runs(images), abs=1e-5)
    one_picture = image.expand(3, -1, -1, -1)
    three_masks = compare(image, masks)[:2]
    assert three_masks == pytest.approx(mean_of_single_runs(one_picture), abs=1e-5)
    assert compare(images, mask)[:2] != three_masks


def test_what_cannot_be_compared_is_explained(compare, models, picture):
    image, mask = picture
    one_empty = torch.cat([mask, mask * 0])
    with pytest.raises(ValueError, match="mask of 1 of 2 pictures is empty; there is nothing to"):
        compare(image, one_empty)
    with pytest.raises(ValueError, match="The text is empty"):
        compare(image, mask, text=" ")
    whole = models.cat_model
    adapter_alone = CatModel("x", whole.architecture, ref_adapter=whole.ref_adapter)
    with pytest.raises(ValueError, match="no SemInpainter"):
        compare(image, mask, adapter_alone)
