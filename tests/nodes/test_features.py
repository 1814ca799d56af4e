"""What the host's CLIP models give equals Hugging Face's transformers on the same weights."""

import dataclasses

import pytest
import torch

from cat_diffusion.nodes.host import memory, model_files
from cat_diffusion.nodes.host.clip import encode_image, encode_text


def test_image_features_equal_transformers(models):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from cat_diffusion.cat_core import preprocess

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    official = CLIPVisionModel(config).eval()
    load(official, models.file.parts["clip_vision"], "vision_model.")
    pixels = torch.randint(
        0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    expected = official(pixel_values=preprocess.clip_normalise(pixels))
    patches, image = encode_image(models.clip_vision, pixels)
    assert_close(patches, expected.last_hidden_state[:, 1:])
    assert_close(image, expected.pooler_output)


TEXTS = [
    "spoon",
    "a (red:1.4) [fire] hydrant",
    "a \\(thing\\) embedding:none",
    "one " * 200,
    "ünïcödé 汉字",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_features_equal_transformers(models, text):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        eos_token_id=49407,
        bos_token_id=49406,
    )
    official = CLIPTextModel(config).eval()
    load(official, models.file.parts["clip_text"], "text_model.")
    tokenizer = models.clip.tokenizer.clip_l.tokenizer
    tokens = tokenizer(
        text, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    expected = official(tokens["input_ids"]).pooler_output
    assert_close(encode_text(models.clip, text, 24), expected)


def test_clip_skip_does_not_matter(models):
    skipped = models.clip.clone()
    skipped.clip_layer(-2)
    assert torch.equal(encode_text(skipped, "spoon", 24), encode_text(models.clip, "spoon", 24))


def test_the_visual_prompt_of_the_node_equals_the_core_on_the_same_features(
    models, picture, prompt
):
    from cat_diffusion.cat_core import features, preprocess, weights
    from cat_diffusion.nodes.wires import to_core

    seen = preprocess.clip_input(*to_core(*picture))
    core = weights.cat_modules(models.file.architecture)["sem_inpainter"]
    core.load_state_dict(models.file.parts["sem_inpainter"])
    patches, image = encode_image(models.clip_vision, seen.masked_image)
    out = core(patches, image, encode_text(models.clip, "spoon", 24), seen.patch_mask)
    after = features.blend(out.patches, patches, seen.patch_mask)
    assert_close(prompt.after, after)
    assert_close(prompt.tokens, features.pool(after))
    assert torch.equal(prompt.before, patches)
    assert torch.equal(prompt.patch_mask, seen.patch_mask) and prompt.text == "spoon"
    hidden = ~seen.patch_mask.flatten().bool()
    assert torch.equal(prompt.after[:, hidden], prompt.before[:, hidden])


def test_batches_run_in_chunks_with_the_same_result(models, picture, monkeypatch):
    from cat_diffusion.nodes.visual_prompt import CATSemanticInpaint

    images = torch.cat([picture[0] * factor for factor in (1.0, 0.5, 0.2)])
    arguments = models.cat_model, models.clip_vision, models.clip
    whole = CATSemanticInpaint.execute(*arguments, images, picture[1], "spoon").args[0]
    monkeypatch.setattr(memory, "BATCH", 2)
    chunked = CATSemanticInpaint.execute(*arguments, images, picture[1], "spoon").args[0]
    assert whole.tokens.shape == (3, 64, 32)
    for field in dataclasses.fields(whole)[:3]:
        assert_close(getattr(whole, field.name), getattr(chunked, field.name))
    single = CATSemanticInpaint.execute(*arguments, images[1:2], picture[1], "spoon").args[0]
    assert_close(whole.tokens[1:2], single.tokens)


def test_encode_visual_prompt(models, picture):
    from cat_diffusion.nodes.visual_prompt import CATEncodeVisualPrompt

    reference = CATEncodeVisualPrompt.execute(models.clip_vision, picture[0]).args[0]
    masked = CATEncodeVisualPrompt.execute(models.clip_vision, *picture).args[0]
    assert reference.tokens.shape == (1, 64, 32) and reference.before is reference.after
    assert not torch.allclose(reference.tokens, masked.tokens)
    many = CATEncodeVisualPrompt.execute(
        models.clip_vision, picture[0], picture[1].repeat(3, 1, 1)
    ).args[0]
    assert many.tokens.shape[0] == 3


@pytest.mark.parametrize("which", ["model", "sem_inpainter", "ref_adapter"])
def test_the_host_can_rebuild_a_part_from_its_file(models, which):
    from comfy.model_patcher import ModelPatcher

    if "force_deepcopy" not in ModelPatcher.clone.__code__.co_varnames:
        pytest.skip("this host does not rebuild models from their files")
    patcher = models.model if which == "model" else getattr(models.cat_model, which)
    rebuilt = patcher.clone(force_deepcopy=True)
    assert rebuilt.model is not patcher.model
    ours, theirs = patcher.model.state_dict(), rebuilt.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("left", [0.3, 0.999])
def test_a_file_that_was_cut_short_is_said_whoever_reads_it(tiny_file, tmp_path, left):
    """With dynamic VRAM the host's own reader reads it, which does not check."""
    from cat_diffusion.cat_core.weights import WeightsError

    whole = tiny_file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(WeightsError, match="cut.safetensors is damaged or cut short"):
        model_files.read_path(tmp_path / "cut.safetensors")


def load(model, tensors, level):
    """Into a transformers model of either spelling."""
    keys = model.state_dict().keys()
    if not any(key.startswith(level) for key in keys):
        tensors = {key.removeprefix(level): tensor for key, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
