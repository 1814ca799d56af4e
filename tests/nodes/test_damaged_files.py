"""Files whose headers and shapes lie: each is refused in a sentence, before memory is asked for."""

import dataclasses
import json
import math
import random

import pytest

from cat_diffusion.cat_core import weights
from cat_diffusion.nodes.load import load_full_checkpoint

pytestmark = pytest.mark.slow

SHAPES = [
    (),
    (1,),
    (5,),
    (0,),
    (3, 0),
    (1, 1),
    (2, 3, 1, 1),
    (1, 1, 1, 1, 1),
    (0, 1 << 40, 1 << 40),
]


@pytest.fixture(scope="module")
def official(tiny):
    """(tensors, header) of the tiny checkpoint."""
    parts, architecture = tiny
    header = weights.header(parts, architecture, licence="MIT", provenance="random")
    return weights.flat(parts), header


def write(path, stored, metadata):
    """Safetensors of (shape, bytes) by key; PyTorch cannot make all of these shapes."""
    header = {"__metadata__": metadata}
    end = 0
    for key, (shape, data) in stored.items():
        offsets = [end, end + len(data)]
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    content = b"".join(data for _, data in stored.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.fixture
def refused(official, tmp_path):
    """The tiny checkpoint with changes is refused with these words, and others that help."""
    tensors, header = official
    whole = {key: (tensor.shape, tensor.numpy().tobytes()) for key, tensor in tensors.items()}

    def refused(words, reshaped=None, **changed_header):
        path = tmp_path / "x.safetensors"
        content = dict(whole)
        for key, shape in (reshaped or {}).items():
            content[key] = (shape, bytes(4 * math.prod(shape)))
        write(path, content, {**header, **changed_header})
        with pytest.raises(ValueError, match=r"x\.safetensors") as error:
            load_full_checkpoint(path)
        assert type(error.value) is ValueError
        message = str(error.value)
        assert words in message and "\n" not in message and len(message) < 700

    return refused


@pytest.mark.parametrize(
    "key, shape, words",
    [
        ("fusion_model.embeddings.position_embedding.weight", (0, 32), "expected sizes from 1"),
        ("fusion_model.embeddings.position_embedding.weight", (32,), "expected 2 dimensions"),
        ("fusion_model.label_mlp.fc1.weight", (), "expected 2 dimensions"),
        ("fusion_model.spatial_mlp.fc1.weight", (5,), "expected 2 dimensions"),
        ("fusion_model.post_layernorm.bias", (0, 1 << 40, 1 << 40), "expected sizes from 0"),
        ("fusion_model.post_layernorm.bias", (1 << 20 | 1,), "expected sizes from 0"),
        ("first_stage_model.encoder.conv_in.weight", (3,), "expected 4 dimensions"),
        ("first_stage_model.post_quant_conv.weight", (4, 4), "expected 4 dimensions"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", (), "1 dimensions"),
    ],
)
def test_shapes_that_no_model_has(refused, official, key, shape, words):
    assert key in official[0]
    refused(words, {key: shape})


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("embeddings.patch_embedding.weight", (32, 3), "expected 4 dimensions"),
        ("embeddings.position_embedding.weight", (0, 32), "expected sizes from 1"),
        ("embeddings.position_embedding.weight", (1, 32), "1 positions are not one and a square"),
        ("embeddings.position_embedding.weight", (4, 32), "4 positions are not one and a square"),
    ],
)
def test_shapes_that_no_image_encoder_has(refused, name, shape, words):
    refused(words, {f"cond_stage_model2.encoder.vision_model.{name}": shape})


@pytest.mark.parametrize("seed", range(6))
def test_any_tensor_of_any_shape_is_refused_in_a_sentence(refused, official, seed):
    chance = random.Random(seed)
    keys = [key for key in official[0] if "attn3" not in key]
    for _ in range(20):
        key = chance.choice(keys)
        shape = chance.choice(SHAPES)
        if shape != tuple(official[0][key].shape):
            refused("", {key: shape})


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 20_000, "nested too deeply"),
        ("[" * 2_000_000, "expected at most 1,000,000"),
        ("[]", "cannot be read"),
        ("1" * 5000, "cannot be read"),
        ('{"sem_inpainter": null, "ref_adapter": null}', "cannot be read"),
        ('{"\\ud800": 1}', "cannot be read"),
        (json.dumps({"x" * 5000: 1}), "cannot be read"),
    ],
)
def test_an_architecture_that_is_none(refused, text, words):
    refused(words, architecture=text)


NO_SIZES = [32.0, "32", True, None, [], {}, 0, -1, 10**30, 1 << 21, float("nan"), float("inf")]


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize(
    "place",
    [
        ("sem_inpainter", "hidden_size"),
        ("sem_inpainter", "num_attention_heads"),
        ("ref_adapter", "visual_size"),
        ("ref_adapter", "num_heads"),
        ("unet_num_heads",),
    ],
)
def test_a_size_that_is_none(refused, official, place, value):
    if place == ("unet_num_heads",) and value is None:
        return
    facts = json.loads(official[1]["architecture"])
    owner = facts[place[0]] if len(place) == 2 else facts
    owner[place[-1]] = value
    words = f"{place[-1]} in the metadata is"
    refused(words, architecture=json.dumps(facts))


@pytest.mark.parametrize("value", ["1e-5", 0.0, -1e-5, 1, float("nan"), float("inf"), None])
def test_an_epsilon_that_is_none(refused, official, value):
    facts = json.loads(official[1]["architecture"])
    facts["sem_inpainter"]["layer_norm_eps"] = value
    refused("expected a number between 0 and 1", architecture=json.dumps(facts))


@pytest.mark.parametrize(
    "blocks", [None, 3, "x", [[]], [["a"]], [["a", 1.0]], [[1, 1]], [["a", 1, 2]], {"a": 1}]
)
def test_blocks_that_are_none(refused, official, blocks):
    facts = json.loads(official[1]["architecture"])
    facts["ref_adapter"]["blocks"] = blocks
    refused("metadata", architecture=json.dumps(facts))


@pytest.mark.parametrize(
    "fact, part",
    [
        ("unet_num_heads", "U-Net"),
        ("clip_text_num_heads", "CLIP text encoder"),
        ("clip_vision_num_heads", "CLIP vision encoder"),
    ],
)
def test_heads_that_do_not_divide_a_width(refused, tiny, fact, part):
    architecture = dataclasses.replace(tiny[1], **{fact: 7})
    refused(f"The {part} in x.safetensors does not fit: 7", architecture=architecture.to_json())


@pytest.mark.parametrize("version", ["²", "٣", "1.0", "-1", "", "9" * 5000, "\ud7ff"])
def test_versions_that_are_none(refused, version):
    refused("this pack reads up to 1. Update the pack", format_version=version)
