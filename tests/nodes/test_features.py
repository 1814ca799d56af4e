"""What the host's CLIP models give equals Hugging Face's transformers on the same weights."""

import inspect

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from cat_diffusion.cat_core import features, preprocess, weights
from cat_diffusion.cat_core.weights import WeightsError
from cat_diffusion.nodes.host import memory, model_files
from cat_diffusion.nodes.host.clip import encode_image, encode_text
from cat_diffusion.nodes.visual_prompt import encode_visual_prompt, predict
from cat_diffusion.nodes.wires import to_core

TEXT_WIDTH = 24
TEXTS = [
    "spoon",
    "a (red:1.4) [fire] hydrant",
    "a \\(thing\\) embedding:none",
    "one " * 200,
    "ünïcödé 汉字",
]


def load(model, tensors, level):
    """Into a transformers model of either spelling."""
    keys = model.state_dict().keys()
    if not any(key.startswith(level) for key in keys):
        tensors = {key.removeprefix(level): tensor for key, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all("position_ids" in key for key in missing)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_image_features_equal_transformers(models):
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
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator)
    expected = official(pixel_values=preprocess.clip_normalise(pixels))
    patches, image = encode_image(models.clip_vision, pixels)
    assert_close(patches, expected.last_hidden_state[:, 1:])
    assert_close(image, expected.pooler_output)


@pytest.mark.parametrize("text", TEXTS)
def test_text_features_equal_transformers(models, text):
    config = CLIPTextConfig(
        hidden_size=TEXT_WIDTH,
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
    assert_close(encode_text(models.clip, text, TEXT_WIDTH), expected)


def test_clip_skip_does_not_matter(models):
    skipped = models.clip.clone()
    skipped.clip_layer(-2)
    expected = encode_text(models.clip, "spoon", TEXT_WIDTH)
    assert torch.equal(encode_text(skipped, "spoon", TEXT_WIDTH), expected)


def test_the_visual_prompt_of_the_node_equals_the_core_on_the_same_features(
    models, picture, prompt
):
    seen = preprocess.clip_input(*to_core(*picture))
    core = weights.cat_modules(models.file.architecture)["sem_inpainter"]
    core.load_state_dict(models.file.parts["sem_inpainter"])
    patches, image = encode_image(models.clip_vision, seen.masked_image)
    text = encode_text(models.clip, "spoon", TEXT_WIDTH)
    out = core(patches, image, text, seen.patch_mask)
    after = features.blend(out.patches, patches, seen.patch_mask)
    assert_close(prompt.after, after)
    assert_close(prompt.tokens, features.pool(after))
    assert torch.equal(prompt.before, patches)
    assert torch.equal(prompt.patch_mask, seen.patch_mask)
    assert prompt.text == "spoon"
    outside = ~seen.patch_mask.flatten().bool()
    assert torch.equal(prompt.after[:, outside], prompt.before[:, outside])


def test_batches_run_in_chunks_with_the_same_result(models, picture, monkeypatch):
    image, mask = picture
    images = torch.cat([image * factor for factor in (1.0, 0.5, 0.2)])

    def run(images):
        return predict(models.cat_model, models.clip_vision, models.clip, images, mask, "spoon")

    whole = run(images)
    assert whole.tokens.shape == (3, 64, 32)
    monkeypatch.setattr(memory, "BATCH", 2)
    chunked = run(images)
    for name in ("tokens", "before", "after"):
        assert_close(getattr(whole, name), getattr(chunked, name))
    assert_close(whole.tokens[1:2], run(images[1:2]).tokens)


def test_encode_visual_prompt(models, picture):
    image, mask = picture
    reference = encode_visual_prompt(models.clip_vision, image)
    masked = encode_visual_prompt(models.clip_vision, image, mask)
    many = encode_visual_prompt(models.clip_vision, image, mask.repeat(3, 1, 1))
    assert reference.tokens.shape == (1, 64, 32)
    assert reference.before is reference.after
    assert not torch.allclose(reference.tokens, masked.tokens)
    assert len(many.tokens) == 3


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "sem_inpainter", "ref_adapter"])
def test_the_host_can_rebuild_a_part_from_its_file(models, which):
    if "force_deepcopy" not in inspect.signature(ModelPatcher.clone).parameters:
        pytest.skip("this host does not rebuild models from their files")
    patcher = models.model if which == "model" else getattr(models.cat_model, which)
    rebuilt = patcher.clone(force_deepcopy=True)
    assert rebuilt.model is not patcher.model
    ours = patcher.model.state_dict()
    theirs = rebuilt.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("left", [0.3, 0.999])
def test_a_file_that_was_cut_short_is_said_whoever_reads_it(tiny_file, tmp_path, left):
    """With dynamic VRAM the host's own reader reads it, which does not check."""
    whole = tiny_file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(WeightsError, match=r"cut\.safetensors is damaged or cut short"):
        model_files.read_path(cut)
