"""CATCompareFeatures: the numbers are those of the features themselves."""

import numpy as np
import pytest
import torch

from cat_diffusion.nodes.host.cat_model import CatModel


@pytest.fixture
def compare(models):
    from cat_diffusion.nodes.compare import CATCompareFeatures

    def compare(image, mask, cat_model=None, text="spoon"):
        return CATCompareFeatures.execute(
            cat_model or models.cat_model, models.clip_vision, models.clip, image, mask, text
        ).args

    return compare


def cosine(a, b):
    """By hand, in float64."""
    a, b = a.double().numpy(), b.double().numpy()
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_the_numbers_are_mean_cosines_in_the_hole(compare, models, picture, prompt):
    from cat_diffusion.nodes.visual_prompt import CATEncodeVisualPrompt

    observed, predicted, histogram = compare(*picture)
    whole = CATEncodeVisualPrompt.execute(models.clip_vision, picture[0]).args[0].before
    hole = prompt.patch_mask.flatten().bool().numpy()
    assert 0 < hole.sum() < 256
    for found, features in ((observed, prompt.before), (predicted, prompt.after)):
        assert found == pytest.approx(cosine(features[0], whole[0])[hole].mean(), abs=1e-5)
    assert histogram.shape == (1, 240, 640, 3) and 0 <= histogram.min() < histogram.max() <= 1


def test_a_perfect_prediction_is_1(compare, models, picture, monkeypatch):
    from cat_diffusion.nodes import visual_prompt

    whole = (
        visual_prompt.CATEncodeVisualPrompt.execute(models.clip_vision, picture[0]).args[0].before
    )
    monkeypatch.setattr(visual_prompt, "run_sem_inpainter", lambda *_: whole)
    observed, predicted, _ = compare(*picture)
    assert predicted == pytest.approx(1, abs=1e-5) and observed < 0.99


def test_a_batch_is_the_mean_of_its_pictures(compare, picture):
    image, mask = picture
    images = torch.cat([image, image.flip(2), image * 0.5])
    masks = torch.cat([mask, mask.flip(1), mask])
    alone = np.array([compare(images[i : i + 1], masks[i : i + 1])[:2] for i in range(3)])
    assert compare(images, masks)[:2] == pytest.approx(alone.mean(0), abs=1e-5)
    several = compare(image, masks)[:2]  # one picture, three masks
    assert several == pytest.approx(
        np.mean([compare(image, masks[i : i + 1])[:2] for i in range(3)], axis=0), abs=1e-5
    )
    assert compare(images, mask)[:2] != several


def test_what_cannot_be_compared_is_explained(compare, models, picture):
    image, mask = picture
    with pytest.raises(
        ValueError, match="mask of 1 of 2 pictures is empty; there is nothing to compare"
    ):
        compare(image, torch.cat([mask, mask * 0]))
    with pytest.raises(ValueError, match="The text is empty"):
        compare(image, mask, text=" ")
    with pytest.raises(ValueError, match="no SemInpainter"):
        compare(
            image,
            mask,
            CatModel("x", models.cat_model.architecture, None, models.cat_model.ref_adapter),
        )
