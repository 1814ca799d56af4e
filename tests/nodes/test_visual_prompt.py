"""Two objects in one photo, previews of visual prompts, and the scenes that come with the pack."""

import dataclasses

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from cat_diffusion.nodes.host import memory
from cat_diffusion.nodes.host.cat_model import run_sem_inpainter
from cat_diffusion.nodes.host.clip import encode_text, text_similarity


@pytest.fixture(scope="module")
def second(picture):
    """Another hole in the same picture, which overlaps the first one a little."""
    mask = torch.zeros(1, 64, 64)
    mask[:, 40:60, 34:60] = 1.0
    return mask


@pytest.fixture(scope="module")
def predict(models):
    from cat_diffusion.nodes.visual_prompt import predict

    def run(image, mask, text="spoon", previous=None):
        with torch.inference_mode():
            return predict(
                models.cat_model, models.clip_vision, models.clip, image, mask, text, previous
            )

    return run


@pytest.fixture(scope="module")
def demo():
    from demo_model import score

    with torch.inference_mode():
        return score.load(ROOT / "models/cat_demo_model.safetensors")


def test_the_second_object_builds_on_the_first(predict, models, picture, second):
    """Against SemInpainter run by hand: CLIP sees neither hole, the first hole keeps what was predicted in it."""
    from cat_diffusion.cat_core import features, preprocess
    from cat_diffusion.nodes.visual_prompt import see
    from cat_diffusion.nodes.wires import to_core

    first = predict(*picture)
    both = predict(picture[0], second, "cup", first)
    image, mask_1 = to_core(*picture)
    _, mask_2 = to_core(picture[0], second)
    seen, patches, image_feature = see(models.clip_vision, image, torch.maximum(mask_1, mask_2))
    cells_1, cells_2 = (preprocess.clip_input(image, mask).patch_mask for mask in (mask_1, mask_2))
    assert (cells_1 * cells_2).any() and (cells_1 > cells_2).any()
    patches = features.blend(first.after, patches, cells_1)
    text = encode_text(models.clip, "cup")
    predicted = run_sem_inpainter(models.cat_model, patches, image_feature, text, cells_2)
    assert torch.equal(both.before, patches) and torch.equal(
        both.after, features.blend(predicted, patches, cells_2)
    )
    assert torch.equal(both.tokens, features.pool(both.after)) and both.text == "cup"
    kept = ((cells_1 == 1) & (cells_2 == 0)).flatten()
    assert torch.equal(both.after[:, kept], first.after[:, kept])
    assert torch.equal(both.patch_mask, seen.patch_mask)
    assert not torch.allclose(both.tokens, predict(picture[0], second, "cup").tokens)


def test_an_empty_first_hole_changes_nothing(predict, picture, second):
    first = predict(picture[0], torch.zeros(1, 64, 64))
    assert torch.equal(
        predict(picture[0], second, "cup", first).after, predict(picture[0], second, "cup").after
    )


def test_one_photo_with_many_first_holes(predict, picture, second):
    first = predict(picture[0], torch.cat((picture[1], second)))
    both = predict(picture[0], second, "cup", first)
    assert len(both.tokens) == 2
    single = predict(picture[0], second, "cup", predict(*picture))
    assert (both.after[:1] - single.after).abs().max() < 1e-5 * single.after.abs().max()


def test_previous_that_does_not_fit(predict, picture, second):
    first = predict(*picture)
    wide = dataclasses.replace(first, before=torch.zeros(1, 256, 48))
    with pytest.raises(ValueError, match="previous is 48 wide, this SemInpainter makes 32"):
        predict(picture[0], second, "cup", wide)
    three, two = (predict(picture[0].expand(n, -1, -1, -1), second) for n in (3, 2))
    with pytest.raises(ValueError, match="previous holds 3 pictures, here are 2"):
        predict(picture[0].expand(2, -1, -1, -1), second.expand(2, -1, -1), "cup", three)
    assert len(two.tokens) == 2


def test_the_preview_shows_the_grid_and_common_colours(predict, picture, second):
    from cat_diffusion.cat_core.pictures import preview

    prompt = predict(picture[0], torch.cat((picture[1], second)))
    shown = preview.preview_rows(prompt)
    assert shown.shape == (2, 250, 704, 3) and shown.min() >= 0 and shown.max() <= 1
    assert torch.equal(shown, preview.preview_rows(prompt))
    before, after = preview.colours(prompt.before[0], prompt.after[0])
    outside = prompt.patch_mask[0, 0] == 0
    assert before.shape == (16, 16, 3) and torch.equal(before[outside], after[outside])
    assert (before[~outside] != after[~outside]).any()
    tinted = (shown[0, 18:242, 8:232] * 255 - prompt.picture[0].movedim(0, -1)).abs().mean(2)
    cells = prompt.patch_mask[0, 0].bool().repeat_interleave(14, 0).repeat_interleave(14, 1)
    assert tinted[cells].mean() > 5 * tinted[~cells].mean()


def test_a_flat_picture_has_a_preview(predict, picture):
    from cat_diffusion.cat_core.pictures import preview

    prompt = predict(picture[0], picture[1])
    flat = dataclasses.replace(
        prompt, before=torch.ones_like(prompt.before), after=torch.ones_like(prompt.after)
    )
    assert preview.preview_rows(flat).isfinite().all()


def test_similarity_to_the_text(demo, predict, picture, models):
    """Of the demo model, which has both projections; left out where a CLIP has none, as SD 1.5's."""
    from cat_diffusion.nodes.demo_scene import CATDemoScene
    from cat_diffusion.nodes.visual_prompt import CATVisualPromptPreview
    from cat_diffusion.nodes.visual_prompt import predict as run

    _, clip, _, clip_vision, cat_model = demo
    image, mask = CATDemoScene.execute("square hole").args
    prompt = run(cat_model, clip_vision, clip, image, mask, "red star")
    found = text_similarity(clip, clip_vision, prompt)
    vision = clip_vision.model
    cells = vision.visual_projection(vision.vision_model.post_layernorm(prompt.after))
    _, text = clip.encode_from_tokens(clip.tokenize("red star"), return_pooled=True)
    assert (
        found - torch.nn.functional.cosine_similarity(cells, text.view(1, 1, -1), dim=2)
    ).abs().max() < 1e-5
    hidden = prompt.patch_mask.flatten(1).bool()
    assert found[hidden].mean() > found[~hidden].mean() + 0.2
    assert CATVisualPromptPreview.execute(prompt, clip, clip_vision).args[0].shape == (
        1,
        250,
        936,
        3,
    )
    assert CATVisualPromptPreview.execute(prompt).args[0].shape == (1, 250, 704, 3)
    assert text_similarity(models.clip, models.clip_vision, predict(*picture)) is None


def test_of_a_long_batch_the_first_pictures_are_drawn(models, picture, monkeypatch):
    from cat_diffusion.nodes.visual_prompt import CATSemanticInpaint

    monkeypatch.setattr(memory, "BATCH", 2)
    masks = picture[1].repeat(3, 1, 1)
    output = CATSemanticInpaint.execute(
        models.cat_model, models.clip_vision, models.clip, picture[0], masks, "spoon"
    )
    assert (
        len(output.args[0].tokens) == len(output.ui["cat_cells"]) == 3
        and len(output.ui["images"]) == 2
    )


def test_the_node_sends_its_cells_and_a_picture(models, picture):
    from cat_diffusion.nodes.visual_prompt import CATSemanticInpaint

    output = CATSemanticInpaint.execute(
        models.cat_model, models.clip_vision, models.clip, *picture, "spoon"
    )
    cells = output.args[0].patch_mask.flatten().tolist()
    assert output.ui["cat_cells"] == ["".join(map(str, cells))] and len(output.ui["images"]) == 1


def test_scenes_are_what_lies_in_the_pack():
    from cat_diffusion.nodes.demo_scene import FOLDER, CATDemoScene

    names = CATDemoScene.define_schema().inputs[0].options
    assert names == sorted(path.stem for path in FOLDER.glob("*.png")) and len(names) == 4
    for name in names:
        image, mask = CATDemoScene.execute(name).args
        rgba = np.asarray(Image.open(FOLDER / f"{name}.png"))
        assert image.shape == (1, 128, 128, 3) and mask.shape == (1, 128, 128)
        assert np.array_equal((image[0] * 255).round().numpy(), rgba[..., :3])
        assert (
            np.array_equal((mask[0] * 255).round().numpy(), 255 - rgba[..., 3])
            and 0.02 < mask.mean() < 0.3
        )
