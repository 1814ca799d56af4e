"""Two objects in one photo, previews of visual prompts, and the scenes that come with the pack."""

import dataclasses

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from cat_diffusion.cat_core import features, preprocess
from cat_diffusion.cat_core.pictures import preview
from cat_diffusion.nodes import visual_prompt
from cat_diffusion.nodes.demo_scene import FOLDER, CATDemoScene
from cat_diffusion.nodes.host import memory
from cat_diffusion.nodes.host.cat_model import run_sem_inpainter
from cat_diffusion.nodes.host.clip import encode_text, text_similarity
from cat_diffusion.nodes.load import load_full_checkpoint
from cat_diffusion.nodes.visual_prompt import CATSemanticInpaint, CATVisualPromptPreview, see
from cat_diffusion.nodes.wires import to_core


@pytest.fixture(scope="module")
def second(picture):
    """Another hole in the same picture, which overlaps the first one a little."""
    mask = torch.zeros(1, 64, 64)
    mask[:, 40:60, 34:60] = 1.0
    return mask


@pytest.fixture(scope="module")
def predict(models):
    """visual_prompt.predict with the tiny models."""
    tiny = (models.cat_model, models.clip_vision, models.clip)

    def predict(image, mask, text="spoon", previous=None):
        with torch.inference_mode():
            return visual_prompt.predict(*tiny, image, mask, text, previous)

    return predict


@pytest.fixture(scope="module")
def demo():
    """The pack's demo model."""
    with torch.inference_mode():
        return load_full_checkpoint(ROOT / "models/cat_demo_model.safetensors")


@pytest.fixture
def said(caplog):
    """The sentences that the nodes have said since it was last asked."""
    caplog.set_level("INFO")

    def said():
        sentences = [line for line in caplog.messages if line.startswith("CAT-Diffusion: ")]
        caplog.clear()
        return [line.removeprefix("CAT-Diffusion: ") for line in sentences]

    return said


# Two objects ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_second_object_builds_on_the_first(predict, models, picture, second):
    """Against SemInpainter run by hand: CLIP sees neither hole, the first keeps its prediction."""
    image, mask = picture
    first = predict(image, mask)
    both = predict(image, second, "cup", first)

    photo, hole_1 = to_core(image, mask)
    _, hole_2 = to_core(image, second)
    seen, patches, image_feature = see(models.clip_vision, photo, torch.maximum(hole_1, hole_2))
    cells_1 = preprocess.clip_input(photo, hole_1).patch_mask
    cells_2 = preprocess.clip_input(photo, hole_2).patch_mask
    assert (cells_1 * cells_2).any()
    assert (cells_1 > cells_2).any()
    before = features.blend(first.after, patches, cells_1)
    text = encode_text(models.clip, "cup")
    predicted = run_sem_inpainter(models.cat_model, before, image_feature, text, cells_2)

    assert torch.equal(both.before, before)
    assert torch.equal(both.after, features.blend(predicted.patches, before, cells_2))
    assert torch.equal(both.image_feature, predicted.image)
    assert torch.equal(both.tokens, features.pool(both.after))
    assert torch.equal(both.patch_mask, seen.patch_mask)
    assert both.text == "cup"
    first_alone = ((cells_1 == 1) & (cells_2 == 0)).flatten()
    assert torch.equal(both.after[:, first_alone], first.after[:, first_alone])
    assert not torch.allclose(both.tokens, predict(image, second, "cup").tokens)


@pytest.mark.slow
def test_an_empty_first_hole_changes_nothing(predict, picture, second):
    image, _ = picture
    first = predict(image, torch.zeros(1, 64, 64))
    both = predict(image, second, "cup", first)
    assert torch.equal(both.after, predict(image, second, "cup").after)


@pytest.mark.slow
def test_one_photo_with_many_first_holes(predict, picture, second):
    image, mask = picture
    first = predict(image, torch.cat((mask, second)))
    both = predict(image, second, "cup", first)
    assert len(both.tokens) == 2
    single = predict(image, second, "cup", predict(image, mask))
    assert (both.after[:1] - single.after).abs().max() < 1e-5 * single.after.abs().max()


@pytest.mark.slow
def test_previous_that_does_not_fit(predict, picture, second):
    image, mask = picture
    wide = dataclasses.replace(predict(image, mask), before=torch.zeros(1, 256, 48))
    with pytest.raises(ValueError, match="previous is 48 wide, this SemInpainter makes 32"):
        predict(image, second, "cup", wide)
    three = predict(image.expand(3, -1, -1, -1), second)
    two = image.expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="previous holds 3 pictures, here are 2"):
        predict(two, second.expand(2, -1, -1), "cup", three)
    assert len(predict(two, second).tokens) == 2


@pytest.mark.parametrize("pictures", [1, 2, 17])
def test_a_reference_picture_is_no_previous(models, predict, picture, second, pictures):
    """It has no hole in which its features could stay."""
    image, _ = picture
    reference = visual_prompt.encode_visual_prompt(
        models.clip_vision, image.expand(pictures, -1, -1, -1)
    )
    with pytest.raises(ValueError, match="previous has no mask: it holds a whole picture"):
        predict(image.expand(2, -1, -1, -1), second, "cup", reference)


def test_17_previous_pictures_against_2(predict, picture, second):
    image, mask = picture
    many = predict(image.expand(17, -1, -1, -1), mask)
    with pytest.raises(ValueError, match="previous holds 17 pictures, here are 2"):
        predict(image, torch.cat((mask, second)), "cup", many)


# Texts ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_line_break_is_a_space(models, predict, picture):
    output = CATSemanticInpaint.execute(
        models.cat_model, models.clip_vision, models.clip, *picture, "two\r\n spoons\n"
    )
    prompt = output.args[0]
    assert torch.equal(prompt.tokens, predict(*picture, "two spoons").tokens)
    assert len(output.ui["images"]) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "The text is empty. Type the name"),
        (" \n\u3000", "The text is empty: it has only spaces. Type the name"),
        (None, "The text is missing; expected the object's name"),
        (5, "The text is 5; expected the object's name"),
        ("sp\ud83doon", r"The text 'sp\\ud83doon' holds half a character"),
    ],
    ids=ascii,
)
def test_a_text_that_names_nothing(predict, picture, text, words):
    with pytest.raises(ValueError, match=words) as error:
        predict(*picture, text)
    assert str(error.value).encode()
    assert type(error.value) is ValueError


def test_an_empty_mask_is_said_in_a_box_of_two_lines(predict, picture, said):
    predict(picture[0], picture[1] * 0)
    assert said() == ["The mask is empty. Paint it white where the object goes."]


def test_masks_that_are_empty_in_part_are_counted(predict, picture, second, said):
    predict(picture[0], torch.cat((second, second * 0, second * 0)))
    assert said() == ["The mask of 2 of 3 pictures is empty."]


@pytest.mark.slow
def test_a_name_that_the_model_does_not_know_is_said_once_and_goes_on(demo, picture, said):
    image, mask = picture
    masks = mask.expand(2, -1, -1)
    encoders = (demo.clip_vision, demo.clip)
    prompt = visual_prompt.predict(demo.cat_model, *encoders, image, masks, "scarlet star")
    assert prompt.text == "scarlet star"
    (sentence,) = said()
    assert sentence.startswith("This model does not know 'scarlet star'. Nearest: red star, ")
    visual_prompt.predict(demo.cat_model, *encoders, image, masks * 0, "Red  star")
    visual_prompt.predict(demo.cat_model, *encoders, image, masks * 0, "hydrant")
    only_empty, both = said()
    assert both.startswith("This model does not know 'hydrant'. Nearest: ")
    assert both.endswith(f". {only_empty}")


def test_a_text_that_clip_cannot_hold_is_said(models, picture, said):
    visual_prompt.predict(models.cat_model, models.clip_vision, models.clip, *picture, "cat " * 78)
    (sentence,) = said()
    assert "3 at the end of this one are left out. Type the object's name alone." in sentence


# Previews -------------------------------------------------------------------------------------


def test_the_preview_shows_the_grid_and_common_colours(predict, picture, second):
    image, mask = picture
    prompt = predict(image, torch.cat((mask, second)))
    shown = preview.preview_rows(prompt)
    assert shown.shape == (2, 284, 704, 3)
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert torch.equal(shown, preview.preview_rows(prompt))

    before, after = preview.colours(prompt.before[0], prompt.after[0])
    outside = prompt.patch_mask[0, 0] == 0
    assert before.shape == (16, 16, 3)
    assert torch.equal(before[outside], after[outside])
    assert (before[~outside] != after[~outside]).any()

    top = preview.TITLE
    panel = shown[0, top : top + 224, 8:232] * 255
    change = (panel - prompt.picture[0].movedim(0, -1)).abs().mean(2)
    cells = prompt.patch_mask[0, 0].bool().repeat_interleave(14, 0).repeat_interleave(14, 1)
    assert change[cells].mean() > 5 * change[~cells].mean()  # hidden cells are tinted


def test_a_flat_picture_has_a_preview(predict, picture):
    prompt = predict(*picture)
    flat = torch.ones_like(prompt.before)
    assert (
        preview.preview_rows(dataclasses.replace(prompt, before=flat, after=flat)).isfinite().all()
    )


@pytest.mark.slow
def test_similarity_to_the_text(demo, predict, picture, models):
    """Of the demo model, which has both projections; none where a CLIP has none, as SD 1.5's."""
    image, mask = CATDemoScene.execute("square hole").args
    prompt = visual_prompt.predict(
        demo.cat_model, demo.clip_vision, demo.clip, image, mask, "red star"
    )
    found = text_similarity(demo.clip, demo.clip_vision, prompt)
    vision = demo.clip_vision.model
    cells = vision.visual_projection(vision.vision_model.post_layernorm(prompt.after))
    tokens = demo.clip.tokenize("red star")
    _, text = demo.clip.encode_from_tokens(tokens, return_pooled=True)
    expected = torch.nn.functional.cosine_similarity(cells, text.view(1, 1, -1), dim=2)
    assert (found - expected).abs().max() < 1e-5
    hidden = prompt.patch_mask.flatten(1).bool()
    assert found[hidden].mean() > found[~hidden].mean() + 0.2

    (with_similarity,) = CATVisualPromptPreview.execute(prompt, demo.clip, demo.clip_vision).args
    (without,) = CATVisualPromptPreview.execute(prompt).args
    assert with_similarity.shape == (1, 284, 936, 3)
    assert without.shape == (1, 284, 704, 3)
    assert text_similarity(models.clip, models.clip_vision, predict(*picture)) is None


def test_of_a_long_batch_the_first_pictures_are_drawn(models, picture, monkeypatch):
    monkeypatch.setattr(memory, "BATCH", 2)
    image, mask = picture
    output = CATSemanticInpaint.execute(
        models.cat_model, models.clip_vision, models.clip, image, mask.repeat(3, 1, 1), "spoon"
    )
    assert len(output.args[0].tokens) == 3
    assert len(output.ui["cat_cells"]) == 3
    assert len(output.ui["images"]) == 2


def test_the_node_sends_its_cells_and_a_picture(models, picture):
    output = CATSemanticInpaint.execute(
        models.cat_model, models.clip_vision, models.clip, *picture, "spoon"
    )
    cells = output.args[0].patch_mask.flatten().tolist()
    assert output.ui["cat_cells"] == ["".join(map(str, cells))]
    assert len(output.ui["images"]) == 1


# Scenes ---------------------------------------------------------------------------------------


def test_scenes_are_what_lies_in_the_pack():
    names = CATDemoScene.define_schema().inputs[0].options
    assert names == sorted(path.stem for path in FOLDER.glob("*.png"))
    assert len(names) == 4


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.png")), ids=lambda path: path.stem)
def test_a_scene_is_its_file(path):
    image, mask = CATDemoScene.execute(path.stem).args
    rgba = np.asarray(Image.open(path))
    assert image.shape == (1, 128, 128, 3)
    assert mask.shape == (1, 128, 128)
    assert np.array_equal((image[0] * 255).round().numpy(), rgba[..., :3])
    assert np.array_equal((mask[0] * 255).round().numpy(), 255 - rgba[..., 3])
    assert 0.02 < mask.mean() < 0.3
