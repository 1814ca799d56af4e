"""Each symbol of the host that no document promises, asked of the running host.

A test is called after its symbol in nodes/host/symbols, where it is written what breaks.
"""

import ast
import inspect
import re
import types
import uuid
from pathlib import Path

import comfy.cli_args
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import dynamic_vram
import folder_paths
import pytest
import torch
from app.user_manager import UserManager
from comfy_execution import utils as execution
from comfyui_version import __version__
from paths import COMFYUI, ROOT
from safetensors import safe_open
from server import PromptServer

import nodes
from cat_diffusion.nodes.host import symbols

OLD = tuple(map(int, __version__.split(".")[:2])) < (0, 30)
CODE = [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]


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


def cited(text):
    """(file, number of the line, word to look for there or "") of each line of the host."""
    one_line = " ".join(text.replace("#", " ").split())
    return re.findall(r"\b([\w/]+\.py):(\d+)(?: \(([^)]+)\))?", one_line)


def written_beside(name):
    """The docstring of a symbol, or the comment above a constant."""
    for file in Path(symbols.__file__).parent.glob("*.py"):
        text = file.read_text("utf-8")
        constant = re.search(rf"((?:^#.*\n)+){name} = ", text, re.M)
        if constant:
            return constant[1]
    return inspect.getdoc(getattr(symbols, name))


@pytest.mark.parametrize("name", symbols.__all__)
def test_every_symbol_is_asked_for(name):
    assert f"test_{name}" in globals(), f"no test asks the host for {name}"


@pytest.mark.parametrize("name", symbols.__all__)
def test_every_symbol_says_where_the_host_explains_it(name):
    places = cited(written_beside(name))
    assert places, f"{name} cites no line of the host"
    for file, _, word in places:
        assert word, f"{name} does not say what to look for in {file}"
        assert word in (COMFYUI / file).read_text("utf-8"), f"{file} has no {word} of {name}"


@pytest.mark.skipif(__version__ != "0.30.0", reason="the lines are those of 0.30.0")
def test_every_cited_line_has_the_word():
    wrong = []
    for path in CODE:
        for file, number, word in cited(path.read_text("utf-8")):
            lines = (COMFYUI / file).read_text("utf-8").splitlines()
            if not word or word not in lines[int(number) - 1]:
                wrong.append(f"{path.name}: {file}:{number} ({word})")
    assert wrong == []


INSIDE = ["diffusion_model", "cond_stage_model", "model_config", "latent_format"]
INSIDE += ["first_stage_model", "model_options", "get_model_object"]
WORDS = ["cond_or_uncond", "block_index", "transformer_options"]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_door_reaches_into_the_host(path):
    """No attribute of a MODEL, CLIP or VAE, and no key of its options, outside of nodes/host."""
    if path.is_relative_to(ROOT / "nodes" / "host"):
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and not is_own(node):
            assert node.attr not in INSIDE, f"line {node.lineno} reaches for .{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in WORDS, f"line {node.lineno} spells {node.value}"
        elif isinstance(node, ast.keyword):
            assert node.arg not in WORDS, f"line {node.value.lineno} names {node.arg}"


def is_own(attribute):
    """Whether it is a function of the door: symbols.model_config."""
    return isinstance(attribute.value, ast.Name) and attribute.value.id == "symbols"


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


def test_CASTING_LAYERS():
    layer = symbols.CASTING_LAYERS.Linear(2, 3, dtype=torch.float16)
    layer.load_state_dict({"weight": torch.ones(3, 2).half(), "bias": torch.zeros(3).half()})
    output = layer(torch.ones(1, 2))
    assert output.dtype == torch.float32
    assert torch.equal(output, torch.full((1, 3), 2.0))


def test_PLAIN_LAYERS():
    layer = symbols.PLAIN_LAYERS.Linear(2, 3)
    layer.load_state_dict({"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3, 2))


def test_compute_device():
    assert symbols.compute_device() == torch.device("cpu")  # where the tests compute


def test_waiting_device():
    assert symbols.waiting_device() == torch.device("cpu")


def test_results_device():
    assert symbols.results_device() == torch.device("cpu")


def test_device_of(models, module):
    assert symbols.device_of(symbols.new_patcher(module)) == symbols.compute_device()
    assert symbols.device_of(models.clip_vision) == symbols.compute_device()


def test_load(module):
    patcher = symbols.new_patcher(module)
    symbols.load([patcher], activations=1000, wholly=True)
    assert patcher in comfy.model_management.loaded_models()


def test_unload_all(module):
    patcher = symbols.new_patcher(module)
    symbols.load([patcher])
    symbols.unload_all()
    assert patcher not in comfy.model_management.loaded_models()


def test_Cancelled():
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(symbols.Cancelled):
        symbols.raise_if_cancelled()


def test_raise_if_cancelled():
    symbols.raise_if_cancelled()  # nobody has cancelled
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(symbols.Cancelled):
        symbols.raise_if_cancelled()
    symbols.raise_if_cancelled()  # once is enough


def test_patchers_of_patches(spy):
    assert symbols.patchers_of_patches(spy.patched) == [spy.patcher]


def test_bytes_of(module):
    patchers = [symbols.new_patcher(module), symbols.new_patcher(module)]
    assert symbols.bytes_of(patchers) == 2 * 18  # 9 numbers of two bytes each


def test_parameter_count():
    tensors = {"one": torch.zeros(2, 3), "two.three": torch.zeros(4)}
    assert symbols.parameter_count(tensors) == 10


def test_read_tensors(tiny_file):
    tensors, metadata = symbols.read_tensors(tiny_file)
    with safe_open(tiny_file, "pt") as file:
        assert set(tensors) == set(file.keys())
        assert metadata == file.metadata()


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


def test_UNET_PREFIX(models):
    keys = models.model.model.state_dict()
    of_unet = {key for key in keys if key.startswith(symbols.UNET_PREFIX)}
    stored = models.file.parts["unet"]
    assert {key.removeprefix(symbols.UNET_PREFIX) for key in of_unet} == set(stored)


def test_unet_module(models):
    assert set(symbols.unet_module(models.model).state_dict()) == set(models.file.parts["unet"])


def test_is_sd_unet(models, module):
    assert symbols.is_sd_unet(symbols.unet_module(models.model))
    assert not symbols.is_sd_unet(module)


def test_input_channels(models):
    assert symbols.input_channels(symbols.unet_module(models.model)) == 9


def test_new_unet(models):
    stored = models.file.parts["unet"]
    config = symbols.sd15_config(models.file.checked("unet"), 4).unet_config
    with dynamic_vram.ordinary_layers():
        unet = symbols.new_unet(config, symbols.PLAIN_LAYERS, torch.device("meta"))
    assert {key: tensor.shape for key, tensor in unet.state_dict().items()} == {
        key: tensor.shape for key, tensor in stored.items()
    }
    assert {tensor.dtype for tensor in unet.parameters()} == {torch.float32}


def test_spatial_transformers(models):
    unet = symbols.unet_module(models.model)
    holders = list(symbols.spatial_transformers(unet))
    assert len(holders) == len(models.cat_model.architecture.ref_adapter.blocks)
    assert {len(holder.transformer_blocks) for holder in holders} == {1}


def test_is_sd15(models):
    assert symbols.is_sd15(symbols.model_config(models.model))
    assert not symbols.is_sd15(object())


def described(models):
    """A description of the tiny U-Net with types in it, and the U-Net's tensors."""
    tensors = models.file.checked("unet")
    config = symbols.sd15_config(tensors, models.file.architecture.unet_num_heads)
    dtype = symbols.set_dtypes(config, symbols.parameter_count(tensors), torch.float32)
    assert dtype == torch.float32
    return config, tensors


def test_set_dtypes(models):
    config, _ = described(models)
    assert config.unet_config["dtype"] == torch.float32
    assert config.manual_cast_dtype is None


def test_new_base_model(models):
    base = symbols.new_base_model(*described(models), torch.device("cpu"))
    assert base.concat_keys  # it is for inpainting
    assert base.latent_format.scale_factor == 0.18215


def test_fill_base_model(models):
    config, tensors = described(models)
    base = symbols.new_base_model(config, tensors, torch.device("cpu"))
    stored = dict(tensors)
    symbols.fill_base_model(base, tensors, assign=True)
    for key, tensor in base.diffusion_model.state_dict().items():
        assert torch.equal(tensor, stored[key])


def test_model_kind(models):
    assert symbols.model_kind(models.model) == "BaseModel"


def test_latent_scale(models):
    latent = torch.ones(1, 4, 2, 2)
    assert symbols.latent_scale(models.model) == 0.18215
    scaled = latent * symbols.latent_scale(models.model)
    assert torch.equal(symbols.scale_latent(models.model, latent), scaled)


def test_noise_schedule(models):
    """With what other nodes changed."""
    changed = models.model.clone()
    schedule = symbols.noise_schedule(models.model)
    other = type(schedule)()
    changed.add_object_patch("model_sampling", other)
    assert symbols.noise_schedule(changed) is other
    assert symbols.noise_schedule(models.model) is schedule


def test_discrete_sigmas(models):
    sigmas = symbols.discrete_sigmas(symbols.noise_schedule(models.model))
    assert sigmas.shape == (1000,)
    assert (sigmas.diff() > 0).all()
    continuous = comfy.model_sampling.ModelSamplingContinuousEDM()
    assert symbols.discrete_sigmas(continuous) is None


def test_sigma_at(models):
    schedule = symbols.noise_schedule(models.model)
    half = symbols.sigma_at(schedule, 0.5)
    assert symbols.sigma_at(schedule, 0.25) > half > symbols.sigma_at(schedule, 1.0) == 0
    assert isinstance(half, float)


def test_scale_latent(models):
    latent = torch.ones(1, 4, 2, 2)
    assert torch.allclose(symbols.scale_latent(models.model, latent), latent * 0.18215)


def test_vae_cell(models):
    pixels = torch.rand(1, 64, 64, 3)
    assert symbols.vae_cell(models.vae) == 64 // models.vae.encode(pixels).shape[-1]


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
        assert sorted(kind for kind, _ in chunks) == [symbols.POSITIVE, symbols.NEGATIVE]
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


def test_NEGATIVE(spy):
    for options in spy.calls:
        assert set(symbols.kinds_of_batch(options)) == {symbols.POSITIVE, symbols.NEGATIVE}


def test_kinds_of_batch(spy):
    for options in spy.calls:
        assert symbols.kinds_of_batch(options) == options["cond_or_uncond"]


def test_sampler_options(models, spy):
    """As those of a sampling, to a patch."""
    sigmas = torch.ones(2)
    kinds = [symbols.NEGATIVE, symbols.POSITIVE]
    options = symbols.sampler_options(spy.patched, kinds, sigmas)
    spy.calls.clear()
    unet = symbols.unet_module(models.model)
    x = torch.randn(2, 9, 8, 8)
    symbols.call_unet(unet, x, torch.tensor([500.0, 500.0]), torch.randn(2, 77, 24), options)
    assert len(spy.calls) == len(models.cat_model.architecture.ref_adapter.blocks)
    for told in spy.calls:
        assert symbols.kinds_of_batch(told) == kinds
        assert symbols.noise_levels(told) is sigmas


def test_call_unet(models):
    unet = symbols.unet_module(models.model)
    context = torch.randn(1, 77, 24)
    options = symbols.unet_options([lambda x, _: x + 1], symbols.differentiable_attention)
    options.pop("optimized_attention_override")
    arguments = (unet, torch.randn(1, 9, 8, 8), torch.tensor([500.0]), context)
    patched = symbols.call_unet(*arguments, options)
    assert patched.shape == (1, 4, 8, 8)
    assert not torch.equal(patched, symbols.call_unet(*arguments, {}))


def test_options_to_repeat(spy):
    for options in spy.calls:
        kept = symbols.options_to_repeat(options)
        assert symbols.calling_block(kept) == symbols.calling_block(options)
        assert symbols.kinds_of_batch(kept) == symbols.kinds_of_batch(options)


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


@pytest.fixture
def attended():
    """q, k, v (1, 5, 8), and what attention with two heads makes of them."""
    qkv = torch.randn(3, 1, 5, 8)
    heads = [part.unflatten(2, (2, 4)).transpose(1, 2) for part in qkv]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads)
    return qkv, expected.transpose(1, 2).flatten(2)


def test_clip_attention(attended):
    qkv, expected = attended
    assert torch.allclose(symbols.clip_attention(*qkv, 2), expected, atol=1e-5)


def test_fastest_attention(attended, monkeypatch):
    """Whatever the host puts under the name."""
    qkv, expected = attended
    assert torch.allclose(symbols.fastest_attention(*qkv, 2), expected, atol=1e-5)
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", lambda *_: "another")
    assert symbols.fastest_attention(*qkv, 2) == "another"


def test_attention_name():
    assert symbols.attention_name() == "attention_pytorch"  # as configured for a CPU


def test_differentiable_attention(attended):
    qkv, expected = attended
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = qkv.clone().requires_grad_()
        output = symbols.differentiable_attention(q, k, v, 2)
        assert torch.allclose(output, expected, atol=1e-5)
        (gradient,) = torch.autograd.grad(output.sum(), v)
    assert gradient.any()


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


def test_new_text_encoder():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = symbols.stock_text_config() | sizes | {"num_attention_heads": 2}
    encoder = symbols.new_text_encoder(config, torch.float16)
    tensors = encoder.state_dict()
    assert tensors["text_projection.weight"].shape == (8, 8)
    assert tensors["text_model.embeddings.position_embedding.weight"].shape == (77, 8)
    assert tensors["text_model.encoder.layers.0.mlp.fc1.weight"].dtype == torch.float16


def test_new_image_encoder(models):
    config = symbols.vision_config(models.clip_vision)
    plain = symbols.new_image_encoder(config).state_dict()
    assert set(plain) - set(models.file.parts["clip_vision"]) == set()
    projecting = symbols.new_image_encoder(config | {"projection_dim": 5}).state_dict()
    assert projecting["visual_projection.weight"].shape == (5, 32)


def test_new_autoencoder():
    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3}
    ddconfig |= {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
    vae = symbols.new_autoencoder({"ddconfig": ddconfig | {"dropout": 0.0}, "embed_dim": 4})
    tensors = vae.state_dict()
    assert tensors["post_quant_conv.weight"].shape == (4, 4, 1, 1)
    assert tensors["encoder.down.1.block.0.conv1.weight"].shape == (32, 32, 3, 3)


def test_new_clip_vision(models):
    """The tiny image encoder is one, made of the file's tensors."""
    stored = models.file.parts["clip_vision"]
    loaded = models.clip_vision.get_sd()
    for key, tensor in stored.items():
        assert torch.equal(loaded[key], tensor)


def test_new_vae(models):
    """The tiny VAE is one: its cell is not SD 1.5's, and it decodes to the size it encoded."""
    pixels = torch.rand(1, 64, 64, 3)
    latent = models.vae.encode(pixels)
    cell = 64 // latent.shape[-1]
    assert models.vae.downscale_ratio == models.vae.upscale_ratio == cell
    assert models.vae.decode(latent).shape == pixels.shape


def test_latent_channels(models):
    latent = models.vae.encode(torch.rand(1, 64, 64, 3))
    assert symbols.latent_channels(models.vae) == latent.shape[1] == 4


def test_sampled_posterior(models):
    pixels = torch.rand(1, 64, 64, 3)
    mode = models.vae.encode(pixels)
    with symbols.sampled_posterior(models.vae, 1):
        sampled = models.vae.encode(pixels)
    assert sampled.shape == mode.shape
    assert not torch.equal(sampled, mode)
    assert torch.equal(models.vae.encode(pixels), mode)


def test_last_hidden_state(models):
    """A wide picture is squeezed to a square: its right end matters."""
    wide = torch.rand(1, 224, 448, 3)
    hidden = symbols.last_hidden_state(models.clip_vision, wide)
    assert hidden.shape == (1, 257, 32)
    wide[:, :, 400:] = 0
    assert not torch.equal(symbols.last_hidden_state(models.clip_vision, wide), hidden)


def test_load_clip_vision(models):
    symbols.unload_all()
    symbols.load_clip_vision(models.clip_vision)
    assert models.clip_vision.patcher in comfy.model_management.loaded_models()


def test_text_encoders(models):
    assert symbols.text_encoders(models.clip) == {"l"}


def test_context(models):
    tokens = models.clip.tokenize("spoon")
    context = symbols.context(models.clip, tokens)
    assert context.shape == (1, 77, 24)
    (scheduled,) = models.clip.encode_from_tokens_scheduled(tokens)
    assert torch.equal(context, scheduled[0])


def test_pooled_feature(models):
    """As SD 1.5's encoder gives it: not projected."""
    tokens = models.clip.tokenize("spoon")
    pooled = symbols.pooled_feature(models.clip, tokens)
    assert torch.equal(pooled, symbols.unprojected_feature(models.clip, tokens))


def test_vision_config(models):
    config = symbols.vision_config(models.clip_vision)
    assert config["model_type"] == "clip_vision_model"
    assert config["hidden_size"] == 32
    assert symbols.vision_config(types.SimpleNamespace()) == {}


def test_VisionOutput(models):
    """It has what the host's own output of an encoder has, as far as it can."""
    encoded = models.clip_vision.encode_image(torch.rand(2, 224, 224, 3), crop=False)
    hidden = encoded["last_hidden_state"]
    made = symbols.VisionOutput(hidden, encoded["image_embeds"])
    assert isinstance(made, type(encoded))
    assert torch.equal(made["last_hidden_state"], hidden)
    assert made.image_sizes == encoded.image_sizes
    for name in set(vars(encoded)) - set(vars(made)):
        with pytest.raises(AttributeError, match=f"A visual prompt has no {name}"):
            getattr(made, name)


def test_post_layernorm(models):
    stored = models.file.parts["clip_vision"]
    weight = stored["vision_model.post_layernorm.weight"].float()
    bias = stored["vision_model.post_layernorm.bias"].float()
    features = torch.randn(2, 32)
    expected = torch.nn.functional.layer_norm(features, (32,), weight, bias)
    assert torch.allclose(symbols.post_layernorm(models.clip_vision, features), expected, atol=1e-5)


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


def test_tokens_left_out(models):
    assert symbols.tokens_left_out(models.clip, "cat " * 75) == 0
    assert symbols.tokens_left_out(models.clip, "cat " * 78) == 3


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


# Sampling -------------------------------------------------------------------------------------


def test_run_stock_node(models):
    """The four that are run, by the ids of their inputs."""
    latent = {"samples": torch.randn(1, 4, 8, 8)}
    (image,) = symbols.run_stock_node("VAEDecode", vae=models.vae, samples=latent)
    assert torch.equal(image, models.vae.decode(latent["samples"]))
    (entry,) = symbols.run_stock_node("CLIPTextEncode", clip=models.clip, text="spoon")[0]
    assert torch.equal(entry[0], symbols.context(models.clip, models.clip.tokenize("spoon")))
    ids = {
        "KSampler": "model seed steps cfg sampler_name scheduler positive negative latent_image "
        "denoise",
        "InpaintModelConditioning": "positive negative vae pixels mask noise_mask",
    }
    for name, inputs in ids.items():
        required = nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
        assert sorted(required) == sorted(inputs.split())


def test_with_values():
    conditioning = [[torch.zeros(1), {"kept": 1}], [torch.ones(1), {}]]
    changed = symbols.with_values(conditioning, {"new": 2})
    assert [values for _, values in changed] == [{"kept": 1, "new": 2}, {"new": 2}]
    assert [values for _, values in conditioning] == [{"kept": 1}, {}]


def test_seeded_noise():
    latent = torch.zeros(2, 4, 8, 8)
    expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(symbols.seeded_noise(latent, 7), expected)


def test_scheduled_sigmas(models):
    sigmas = symbols.scheduled_sigmas(symbols.noise_schedule(models.model), "ddim_uniform", 5)
    assert sigmas.shape == (6,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0


@pytest.fixture
def sampled(models, conditioned):
    """sampled(sampler, callback) -> the latent after two steps."""
    *conditionings, latent = conditioned
    noise = symbols.seeded_noise(latent["samples"], 1)
    sigmas = symbols.scheduled_sigmas(symbols.noise_schedule(models.model), "ddim_uniform", 2)

    def run(sampler, callback=None):
        return symbols.sample_custom(
            models.model,
            noise,
            7.5,
            symbols.new_sampler(sampler),
            sigmas,
            conditionings,
            latent["samples"],
            callback,
        )

    return run


def test_sample_custom(sampled, capfd):
    steps = []

    def note(step, denoised, x, total):
        steps.append((step, total))

    sampled("euler", note)
    assert steps == [(0, 2), (1, 2)]
    assert "2/2" not in capfd.readouterr().err


def test_new_sampler(sampled):
    calls = []

    def keep(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        calls.append(sigmas)
        return x

    assert sampled(keep).shape == sampled("ddim").shape
    assert len(calls) == 1


def test_sample_euler(sampled):
    def by_hand(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        for number in range(len(sigmas) - 1):
            x = symbols.sample_euler(denoiser, x, sigmas[number : number + 2], extra_args)
        return x

    assert torch.equal(sampled(by_hand), sampled("euler"))


def test_load_stock_checkpoint(tmp_path):
    """tests/nodes/test_bench.py loads with it."""
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"none\.safetensors"):
        symbols.load_stock_checkpoint(str(tmp_path / "none.safetensors"))


def test_load_stock_clip_vision(tmp_path):
    """tests/nodes/test_bench.py loads with it."""
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"none\.safetensors"):
        symbols.load_stock_clip_vision(str(tmp_path / "none.safetensors"))


def test_settings_of_startup():
    """The tools set them by name, before the host is imported."""
    settings = vars(comfy.cli_args.parser.parse_args([]))
    assert settings["cpu"] is False
    assert settings["use_pytorch_cross_attention"] is False


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


def test_locale_of_user(monkeypatch, tmp_path):
    """By the host's own reader of its own file."""
    monkeypatch.setattr(PromptServer, "instance", None, raising=False)
    assert symbols.locale_of_user() == "en"
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    host_server = object.__new__(PromptServer)
    host_server.user_manager = UserManager()
    monkeypatch.setattr(PromptServer, "instance", host_server, raising=False)
    assert symbols.locale_of_user() == "en"
    settings = tmp_path / "default/comfy.settings.json"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text('{"Comfy.Locale": "zh"}')
    assert symbols.locale_of_user() == "zh"


def test_no_progress_bars(models, sample, capfd):
    with symbols.no_progress_bars():
        sample(models.model, steps=1)
    assert "1/1" not in capfd.readouterr().err
    sample(models.model, steps=1)
    assert "1/1" in capfd.readouterr().err


def test_progress_bar(monkeypatch):
    shown = []

    def hook(done, total, *_, **__):
        shown.append((done, total))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    bar = symbols.progress_bar(5)
    bar.update(2)
    assert shown == [(2, 5)]


# Around a sampling ----------------------------------------------------------------------------


class Guided:
    """What wrappers of a sampling and of the U-Net are given, and what its patches are told."""

    def __init__(self, models, sample, spy):
        self.numbers = torch.tensor([[[3]]])
        self.starts = []  # guider of each sampling
        self.lists = {}  # of conditions, as they are when it starts
        spy.calls.clear()
        self.model = spy.patched.clone()
        carry = symbols.carry_to_patches("numbers", lambda tensor: tensor.flatten().tolist())
        for _ in range(2):  # the second time changes nothing
            symbols.wrap_sampling(self.model, "test", self.start, carry)
        self.latent = sample(self.model, steps=1)
        self.calls = spy.calls

    def start(self, executor, *args, **kwargs):
        guider = symbols.guider_of(executor)
        self.starts.append(guider)
        lists = symbols.conditions_of(guider)
        self.lists = {name: [dict(entry) for entry in entries] for name, entries in lists.items()}
        for entry in lists["positive"]:
            symbols.let_travel(entry, "numbers", self.numbers)
        for entry in lists["negative"]:
            symbols.let_travel(entry, "numbers", -self.numbers)
        symbols.tell_patches(guider, "told", "to all")
        return executor(*args, **kwargs)


@pytest.fixture
def guided(models, sample, spy):
    return Guided(models, sample, spy)


def test_wrap_sampling(guided):
    """Once, although it was asked for twice."""
    assert len(guided.starts) == 1
    assert guided.latent.shape == (1, 4, 8, 8)


def test_guider_of(guided):
    assert isinstance(guided.starts[0], comfy.samplers.CFGGuider)


def test_sampled_model(guided):
    assert symbols.sampled_model(guided.starts[0]) is guided.model


def test_conditions_of(guided, conditioned):
    assert {name: len(entries) for name, entries in guided.lists.items()} == {
        "positive": 1,
        "negative": 1,
    }
    (condition,) = guided.lists["positive"]
    mask = conditioned[0][0][1]["concat_mask"]
    assert condition["concat_mask"] is mask


def test_condition_id(guided):
    """As chunks_of_batch calls them."""
    ids = {name: symbols.condition_id(entries[0]) for name, entries in guided.lists.items()}
    for options in guided.calls:
        for kind, condition in symbols.chunks_of_batch(options):
            assert condition == ids["positive" if kind == symbols.POSITIVE else "negative"]


def test_condition_text(guided, conditioned):
    for name, conditioning in zip(("positive", "negative"), conditioned, strict=False):
        assert symbols.condition_text(guided.lists[name][0]) is conditioning[0][0]


def test_tell_patches(guided):
    assert {options["told"] for options in guided.calls} == {"to all"}
    assert "told" not in guided.model.model_options["transformer_options"]


def test_let_travel(guided):
    """The numbers come in the order of the chunks, and none of the prompts is run apart."""
    assert guided.calls
    for options in guided.calls:
        expected = [3 if kind == symbols.POSITIVE else -3 for kind in options["cond_or_uncond"]]
        assert options["numbers"] == expected
        assert len(expected) == 2


def test_carry_to_patches(guided):
    for options in guided.calls:
        assert options["numbers"]
    seen = []

    def executor(x, t, c_concat, c_crossattn, control, transformer_options, **travelling):
        seen.append((transformer_options, travelling))

    before = {"block": 1}
    wrapper = symbols.carry_to_patches("numbers", torch.Tensor.tolist)
    wrapper(executor, 0, 0, transformer_options=before, numbers=torch.ones(1), y=2)
    assert seen == [({"block": 1, "numbers": [1.0]}, {"y": 2})]
    assert before == {"block": 1}
