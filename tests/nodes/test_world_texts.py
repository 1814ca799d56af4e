"""What the demo model reads, in the host's own tokens and features."""

import dynamic_vram
import numpy as np
import pytest
import torch

from cat_diffusion.cat_core import preprocess, weights
from cat_diffusion.nodes.host.build import build_clip
from cat_diffusion.nodes.host.clip import encode_text, plain_tokens
from demo_model import networks, world_recipe
from demo_model.world_samples import clip_pixels, patch_mask
from demo_model.world_texts import STYLE_WORDS, Texts, encode_texts

NAMES = [("apple", "苹果"), ("french fries", "薯条"), ("t-shirt", "T恤")]


@pytest.fixture(scope="module")
def modules():
    with dynamic_vram.ordinary_layers():
        return networks.networks(torch.Generator().manual_seed(0), networks.PHOTOGRAPHS)


@pytest.fixture(scope="module")
def clip(modules, tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    parts = {part: module.state_dict() for part, module in modules.items()}
    architecture = networks.architecture(modules["unet"], networks.PHOTOGRAPHS)
    world_recipe.write(path, parts, architecture)
    return build_clip(weights.read(path))


@pytest.fixture(scope="module")
def tokenize(clip):
    def tokens(text):
        return [token for token, _ in plain_tokens(clip, text)["l"][0]]

    return tokens


@pytest.fixture(scope="module")
def texts(tokenize):
    return Texts(NAMES, tokenize)


def test_a_caption_has_the_tokens_of_its_words(texts, tokenize):
    possible = set()
    for order in ((0, 2), (2, 0)):
        for language, comma, colon in ((0, ",", ":"), (1, "、", "\uff1a")):
            caption = comma.join(NAMES[thing][language] for thing in order)
            styled = f"{STYLE_WORDS[language][1]}{colon}{caption}"
            possible |= {tuple(tokenize(caption)), tuple(tokenize(styled))}
    things = np.array([[0, -1, 2, -1]] * 40)
    captions = texts.captions(things, np.ones(40, int), np.random.default_rng(0))
    assert {tuple(row) for row in captions.tolist()} == possible


def test_a_label_is_the_name_in_one_of_its_forms(texts, tokenize):
    labels = texts.labels(np.array([1] * 60), np.random.default_rng(0))
    expected = ["french fries", "a french fries", "a picture of a french fries"]
    expected += ["薯条", "一个薯条", "薯条的图片"]
    assert {tuple(row) for row in labels.tolist()} == {tuple(tokenize(text)) for text in expected}


@pytest.mark.parametrize("text", ["apple", "薯条", "a picture of a t-shirt", ""])
def test_texts_are_encoded_as_the_host_does(modules, clip, tokenize, text):
    context, pooled = encode_texts(modules["clip_text"], torch.tensor([tokenize(text)]))
    (host_context, _), *_ = clip.encode_from_tokens_scheduled(plain_tokens(clip, text))
    assert torch.allclose(context, host_context.float(), atol=1e-5)
    assert torch.allclose(pooled, encode_text(clip, text).float(), atol=1e-5)


def test_a_shorter_text_has_the_same_pooled_feature(modules, tokenize):
    tokens = torch.tensor([tokenize("apple"), tokenize("一个苹果")])
    _, whole = encode_texts(modules["clip_text"], tokens)
    _, short = encode_texts(modules["clip_text"], tokens, 20)
    assert torch.allclose(whole, short, atol=1e-6)


def test_clip_sees_nearly_what_the_nodes_show_it():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 16, 16, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic").clamp(0, 1)
    hole = torch.zeros(2, 1, 128, 128)
    hole[..., 40:90, 30:70] = 1
    shown = preprocess.clip_input(picture, hole)
    expected = preprocess.clip_normalise(shown.masked_image)
    error = (clip_pixels(picture, hole) - expected).abs()
    assert error.mean() < 0.03  # 2 levels of 255
    assert torch.equal(patch_mask(hole), shown.patch_mask)


def test_a_log_keeps_some_steps_and_the_last(tmp_path):
    log = tmp_path / "log.csv"
    lines = [f"{step},{step / 3}" for step in range(1, 46)]
    log.write_text("step,loss\n" + "\n".join(lines) + "\n", encoding="utf-8")
    kept = world_recipe.log_lines("vae", log)
    assert kept == ["stage,step,loss", "vae,20,6.667", "vae,40,13.33", "vae,45,15"]
