"""Each symbol of the host that no document promises, asked of the running host.

A test is called after its function in nodes/host/symbols.py, whose docstring says what breaks.
"""

import inspect
import re
import types
import uuid

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from comfy_execution import utils as execution
from comfyui_version import __version__
from paths import COMFYUI
from server import PromptServer

from cat_diffusion.nodes.host import symbols

CONSTANTS = ["ANY_SIGMA", "MIDDLE_PATCH", "POSITIVE"]
OLD = tuple(map(int, __version__.split(".")[:2])) < (0, 30)


def is_symbol(value) -> bool:
    return getattr(value, "__module__", None) == symbols.__name__


FUNCTIONS = [name for name, value in vars(symbols).items() if is_symbol(value)]


@pytest.fixture
def module():
    """A model of one layer."""
    return torch.nn.Sequential(torch.nn.Linear(2, 3, dtype=torch.float16))


class Spy(symbols.Patch):
    """A middle patch that adds nothing and writes down what the host does with it."""

    def __init__(self, patcher):
        self.patcher = patcher
        self.calls = []  # extra_options of each call
        self.moves = []  # arguments of to()
        self.cleanups = 0

    def __call__(self, x, extra_options):
        self.calls.append(dict(extra_options))
        return x

    def models(self):
        return [self.patcher]

    def to(self, device_or_dtype):
        self.moves.append(device_or_dtype)
        return self

    def cleanup(self):
        self.cleanups += 1


@pytest.fixture
def spy(models, sample, module):
    """After two steps of a sampling."""
    spy = Spy(symbols.new_patcher(module))
    patched = models.model.clone()
    symbols.add_middle_patch(patched, spy)
    sample(patched, steps=2)
    spy.patched = patched
    return spy


# The inventory itself -------------------------------------------------------------------------


def test_every_symbol_is_asked_for():
    for name in FUNCTIONS + CONSTANTS:
        assert f"test_{name}" in globals(), f"no test asks the host for {name}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_symbol_says_where_the_host_explains_it(name):
    text = inspect.getdoc(getattr(symbols, name))
    places = re.findall(r"([\w/]+\.py):\d+", text)
    assert places, f"{name} cites no line of the host"
    for place in places:
        assert (COMFYUI / place).exists(), f"{place}, cited by {name}, is gone"


# Weights and memory ---------------------------------------------------------------------------


def test_new_patcher(module, monkeypatch):
    patcher = symbols.new_patcher(module)
    assert isinstance(patcher, comfy.model_patcher.ModelPatcher)
    assert patcher.model is module
    assert patcher.load_device == comfy.model_management.get_torch_device()
    assert type(symbols.new_patcher(module, dynamic=False)) is comfy.model_patcher.ModelPatcher

    class Other(comfy.model_patcher.ModelPatcher):
        """As main.py puts another class under the name."""

        def __new__(cls, *_, **__):
            return object.__new__(cls)

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Other)
    assert type(symbols.new_patcher(module)) is Other


def test_is_dynamic(module, pytestconfig):
    expected = pytestconfig.getoption("--dynamic-vram")
    assert symbols.is_dynamic(symbols.new_patcher(module)) is expected
    assert symbols.is_dynamic(symbols.new_patcher(module, dynamic=False)) is False


def test_keep_dtypes(module):
    symbols.keep_dtypes(module)
    assert module[0].weight_comfy_model_dtype == torch.float16


def test_set_factory(module):
    patcher = symbols.new_patcher(module)
    if "force_deepcopy" not in inspect.signature(patcher.clone).parameters:
        pytest.skip("hosts before 0.30 make no model again")

    def build(size, disable_dynamic=False):
        again = torch.nn.Sequential(torch.nn.Linear(size, size))
        return symbols.new_patcher(again, dynamic=not disable_dynamic)

    symbols.set_factory(patcher, build, 7)
    assert patcher.clone(force_deepcopy=True).model[0].in_features == 7


def test_load_device_of_unet():
    device = symbols.load_device_of_unet(1_000_000, torch.float16)
    assert device == torch.device("cpu")  # where the tests compute


def test_LayersWithWeights():
    layer = symbols.LayersWithWeights.Linear(2, 3)
    assert layer.weight.shape == (3, 2)
    assert layer.bias.shape == (3,)


def test_streams_files(pytestconfig):
    assert symbols.streams_files() is pytestconfig.getoption("--dynamic-vram")


def test_maps_no_files(monkeypatch):
    assert symbols.maps_no_files() is False
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    assert symbols.maps_no_files() is True


def test_patched_weights(models):
    key = "diffusion_model.out.2.bias"
    plain = dict(symbols.patched_weights(models.model, "diffusion_model."))
    stored = models.file.parts["unet"]
    assert {name.removeprefix("diffusion_model.") for name in plain} == set(stored)
    assert all(weight.dtype == torch.float32 for weight in plain.values())
    changed = models.model.clone()
    changed.add_patches({key: (torch.ones_like(plain[key]),)}, 0.5)
    patched = dict(symbols.patched_weights(changed, "diffusion_model."))
    assert torch.allclose(patched[key], plain[key] + 0.5)
    assert torch.equal(plain[key], stored["out.2.bias"].float())


# U-Net ----------------------------------------------------------------------------------------


def test_sd15_config(models):
    config = symbols.sd15_config(models.file.checked("unet"), 4)
    assert config.unet_config["in_channels"] == 9
    assert config.unet_config["model_channels"] == 32
    assert config.unet_config["num_heads"] == 4


def test_model_config(models):
    config = symbols.model_config(models.model)
    assert type(config).__name__ == "SD15"
    assert config.unet_config["num_heads"] == models.file.architecture.unet_num_heads


def test_compute_dtype(models):
    assert symbols.compute_dtype(models.model) == torch.float32
    cast = models.model.clone()
    cast.add_object_patch("manual_cast_dtype", torch.bfloat16)
    assert symbols.compute_dtype(cast) == torch.bfloat16


def test_scale_latent(models):
    latent = torch.ones(1, 4, 2, 2)
    assert torch.allclose(symbols.scale_latent(models.model, latent), latent * 0.18215)


def test_vae_cell(models):
    pixels = torch.rand(1, 64, 64, 3)
    assert symbols.vae_cell(models.vae) == 64 // models.vae.encode(pixels).shape[-1]


def test_ANY_SIGMA(models):
    sampling = models.model.get_model_object("model_sampling")
    assert sampling.percent_to_sigma(0.0) >= symbols.ANY_SIGMA
    assert sampling.percent_to_sigma(0.001) < symbols.ANY_SIGMA


# Patches --------------------------------------------------------------------------------------


def test_Patch(spy):
    assert spy.patcher in spy.patched.model_patches_models()
    assert {type(argument) for argument in spy.moves} == {torch.device, torch.dtype}
    if not OLD:
        assert spy.cleanups == 1


def test_add_middle_patch(models, sample):
    """It runs between self-attention and text cross-attention: it can switch the latter's input."""
    changed = models.model.clone()
    symbols.add_middle_patch(changed, lambda x, options: x + 1)
    assert not torch.equal(sample(changed, steps=1), sample(models.model, steps=1))


def test_MIDDLE_PATCH(models):
    """In the order of the block: self-attention's output, the patch, text cross-attention."""
    order = []
    unet = models.model.model.diffusion_model
    block = unet.input_blocks[1][1].transformer_blocks[0]

    def note(name):
        def patch(x, *_):
            order.append(name)
            return x

        return patch

    patches = {
        "attn1_output_patch": [note("self")],
        symbols.MIDDLE_PATCH: [note("middle")],
        "attn2_output_patch": [note("text")],
    }
    block(
        torch.randn(1, 16, 32),
        context=torch.randn(1, 77, 24),
        transformer_options={"patches": patches},
    )
    assert order == ["self", "middle", "text"]


def test_middle_patches(models, spy):
    assert symbols.middle_patches(models.model) == []
    assert symbols.middle_patches(spy.patched) == [spy]


def test_unet_options(models):
    patched = []
    attended = []

    def patch(x, extra_options):
        patched.append(extra_options)
        return x

    def attention(default, *arguments, **named):
        attended.append(default)
        return default(*arguments, **named)

    models.model.model.diffusion_model(
        torch.randn(1, 9, 8, 8),
        torch.tensor([500.0]),
        context=torch.randn(1, 77, 24),
        transformer_options=symbols.unet_options([patch], attention),
    )
    assert len(patched) == len(models.cat_model.architecture.ref_adapter.blocks)
    assert len(attended) == 2 * len(patched)


def test_calling_block(models, spy):
    blocks = [symbols.calling_block(options) for options in spy.calls]
    count = len(models.cat_model.architecture.ref_adapter.blocks)
    assert len(set(blocks)) == count
    assert {kind for kind, _, _ in blocks} == {"input", "middle", "output"}
    assert {index for _, _, index in blocks} == {0}


def test_chunks_of_batch(spy):
    """The positive and the negative prompt, each under its own UUID, the same in every step."""
    ids = set()
    for options in spy.calls:
        chunks = symbols.chunks_of_batch(options)
        assert sorted(kind for kind, _ in chunks) == [symbols.POSITIVE, 1]
        ids.update(chunks)
    assert len(ids) == 2
    assert {type(condition) for _, condition in ids} == {uuid.UUID}
    assert len({condition for _, condition in ids}) == 2


def test_POSITIVE(models, sample, module):
    """At cfg 1 the host runs the positive prompt alone."""
    spy = Spy(symbols.new_patcher(module))
    patched = models.model.clone()
    symbols.add_middle_patch(patched, spy)
    sample(patched, steps=1, cfg=1.0)
    kinds = [kind for options in spy.calls for kind, _ in symbols.chunks_of_batch(options)]
    assert set(kinds) == {symbols.POSITIVE}


def test_noise_levels(models, spy):
    tensors = {id(options["sigmas"]): symbols.noise_levels(options) for options in spy.calls}
    assert len(tensors) == 2  # one tensor for all blocks of a step
    first, second = (sigmas.max().item() for sigmas in tensors.values())
    assert first > second > 0


def test_inpaint_values(models):
    """The model puts them behind the noise: a mask, and a latent that it scales."""
    latent = torch.rand(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    values = symbols.inpaint_values(latent, mask)
    noise = torch.zeros(1, 4, 8, 8)
    channels = models.model.model.concat_cond(noise=noise, device="cpu", **values)
    assert torch.equal(channels[:, :1], mask)
    assert torch.allclose(channels[:, 1:], symbols.scale_latent(models.model, latent))


# CLIP -----------------------------------------------------------------------------------------


def test_clip_attention():
    q, k, v = torch.randn(3, 1, 5, 8)
    heads = [part.unflatten(2, (2, 4)).transpose(1, 2) for part in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads)
    expected = expected.transpose(1, 2).flatten(2)
    assert torch.allclose(symbols.clip_attention(q, k, v, 2), expected, atol=1e-5)


def test_stock_text_config():
    config = symbols.stock_text_config()
    assert config["hidden_act"] == "quick_gelu"
    assert config["max_position_embeddings"] == 77
    assert config["eos_token_id"] == 49407


def test_new_clip(models):
    """The tiny text encoder is one, made of the file's tensors."""
    stored = models.file.parts["clip_text"]
    loaded = models.clip.cond_stage_model.state_dict()
    for key, tensor in stored.items():
        assert torch.equal(loaded[f"clip_l.transformer.{key}"], tensor)


def test_vision_config(models):
    config = symbols.vision_config(models.clip_vision)
    assert config["model_type"] == "clip_vision_model"
    assert config["hidden_size"] == 32
    assert symbols.vision_config(types.SimpleNamespace()) == {}


def test_post_layernorm(models):
    norm = symbols.post_layernorm(models.clip_vision)
    stored = models.file.parts["clip_vision"]["vision_model.post_layernorm.weight"]
    assert torch.equal(norm.weight, stored)


def test_visual_projection(models):
    """A function without weights: the tiny encoder has no projection, as the official files."""
    features = torch.randn(1, 32)
    project = symbols.visual_projection(models.clip_vision)
    assert torch.equal(project(features), features)
    assert not hasattr(project, "weight")


def test_text_projection(models):
    assert symbols.text_projection(models.clip).weight.shape == (24, 24)


def test_token_ids(models):
    ids = symbols.token_ids(models.clip, "a (spoon:1.4)")
    assert len(ids) == 77
    assert ids[0] == 49406
    plain = [token for token, _ in models.clip.tokenize("a spoon")["l"][0]]
    assert set(plain) <= set(ids)  # and the brackets, the colon and the number as well
    assert len(set(ids)) > len(set(plain))


def test_unprojected_feature(models, monkeypatch):
    """Of an encoder that projects: the tiny one's projection is made of zeros."""
    tokens = models.clip.tokenize("spoon")
    feature = symbols.unprojected_feature(models.clip, tokens)
    encoder = models.clip.cond_stage_model.clip_l
    *others, projects = encoder.options_default
    assert projects is False  # SD 1.5's own
    monkeypatch.setattr(encoder, "options_default", (*others, True))
    _, projected = models.clip.encode_from_tokens(tokens, return_pooled=True)
    assert not projected.any()
    assert feature.shape == (1, 24)
    assert feature.abs().min() > 0
    assert torch.equal(symbols.unprojected_feature(models.clip, tokens), feature)


# What the user sees ---------------------------------------------------------------------------


def test_show_on_node(monkeypatch):
    """By the host's own method: the bytes that would go to the browser hold node and sentence."""
    sent = []
    host_server = object.__new__(PromptServer)  # its constructor opens a web application
    monkeypatch.setattr(host_server, "send_sync", lambda *event: sent.append(event), raising=False)
    monkeypatch.setattr(PromptServer, "instance", host_server, raising=False)
    symbols.show_on_node("nothing runs")
    assert sent == []
    with execution.CurrentNodeContext("prompt", "7"):
        symbols.show_on_node("hello")
    ((_, message, *_),) = sent
    assert message.endswith(b"7hello")


def test_no_progress_bars(models, sample, capfd):
    with symbols.no_progress_bars():
        sample(models.model, steps=1)
    assert "1/1" not in capfd.readouterr().err
    sample(models.model, steps=1)
    assert "1/1" in capfd.readouterr().err
