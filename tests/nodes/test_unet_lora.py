"""The U-Net's LoRA: what training learns is what ComfyUI's own loader adds."""

import dataclasses

import folder_paths
import pytest
import torch

import nodes as stock
from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.models.unet_lora import LoraError, UnetLora
from cat_diffusion.cat_core.training import start
from cat_diffusion.nodes.host import messages
from cat_diffusion.nodes.host.build import build_unet
from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
from cat_diffusion.nodes.load import CATLoadWeights

pytestmark = pytest.mark.slow

RANK = 3


@pytest.fixture
def lora(tiny):
    """One that has learned something."""
    parts, _ = tiny
    with torch.inference_mode(False):
        lora = start.unet_lora({"unet": parts["unet"]}, RANK, seed=0)
        for addition in lora.additions.values():
            torch.nn.init.normal_(addition.lora_up.weight, std=0.05)
    return lora


@pytest.fixture
def merged(models, lora):
    """The tiny checkpoint with the LoRA in its U-Net."""
    parts = dict(models.file.parts)
    parts["unet"] = lora.merged(parts["unet"])
    return dataclasses.replace(models.file, parts=parts)


@torch.inference_mode(False)
def test_layers_add_what_merged_weights_hold_and_alone_learn(models, lora, merged):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 8, 8, generator=generator)
    timestep = torch.tensor([3, 900])
    context = torch.randn(2, 77, 24, generator=generator)
    unet = trainable_unet(models.file).requires_grad_(False)
    before = unet.state_dict()
    plain = Denoiser(unet, None)(x, timestep, context, None)
    lora.attach(unet)
    denoiser = Denoiser(unet, None, unet_lora=lora)
    made = denoiser(x, timestep, context, None)
    expected = Denoiser(trainable_unet(merged), None)(x, timestep, context, None)
    assert (made - plain).abs().max() > 100 * (made - expected).abs().max()
    assert torch.allclose(made, expected, atol=1e-5)
    assert list(before) == list(unet.state_dict())  # no key has another name
    made.square().mean().backward()
    learning = {name for name, one in denoiser.named_parameters() if one.grad is not None}
    assert learning == {name for name, _ in denoiser.named_parameters() if "lora_" in name}


def test_comfyui_loads_it(models, lora, merged, sample, tmp_path, monkeypatch, pytestconfig):
    if pytestconfig.getoption("--dynamic-vram"):
        pytest.skip("the host adds a LoRA while it pages weights in, which a CPU does not do")
    path = tmp_path / "thing.safetensors"
    weights.save(path, weights.flat({"unet_lora": lora.state_dict()}), {"format": "pt"})
    kinds = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", kinds)
    (patched,) = stock.LoraLoaderModelOnly().load_lora_model_only(models.model, path.name, 1.0)
    assert len(patched.patches) == len(lora.additions)
    made = sample(patched)
    expected = sample(build_unet(merged))
    assert (made - sample(models.model)).abs().max() > 1e-2
    assert torch.allclose(made, expected, atol=1e-4)


def test_the_loader_of_weights_says_that_it_leaves_one_out(tiny, lora, tmp_path, monkeypatch):
    parts, architecture = tiny
    trained = {"ref_adapter": parts["ref_adapter"], "unet_lora": lora.state_dict()}
    header = weights.cat_metadata(trained, architecture, licence="MIT", provenance="random")
    weights.save(tmp_path / "both.safetensors", weights.flat(trained), header)
    kinds = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "cat_diffusion", kinds)
    said = []
    monkeypatch.setattr(messages, "say", lambda *sentences: said.extend(sentences))
    CATLoadWeights.execute("both.safetensors")
    assert "The LoRA in this file is left out" in str(said[-1])


def test_a_new_one_has_no_effect(tiny):
    parts, _ = tiny
    merged = start.unet_lora({"unet": parts["unet"]}, RANK, seed=0).merged(parts["unet"])
    assert all(torch.equal(merged[key], tensor) for key, tensor in parts["unet"].items())


def test_what_cannot_go_on_is_named(tiny, lora):
    parts, _ = tiny
    with pytest.raises(LoraError, match="rank is 0, expected 1 or more"):
        UnetLora(parts["unet"], 0)
    before = {"unet": parts["unet"], "unet_lora": lora.state_dict()}
    assert start.unet_lora(before, RANK, seed=1).rank == RANK
    with pytest.raises(LoraError, match="has rank 3, expected 8"):
        start.unet_lora(before, 8, seed=1)
    before["unet_lora"].popitem()
    with pytest.raises(LoraError, match="of another U-Net"):
        start.unet_lora(before, RANK, seed=1)


def test_a_file_with_one_is_read_and_described(lora, tmp_path):
    path = tmp_path / "lora.safetensors"
    weights.save(path, weights.flat({"unet_lora": lora.state_dict()}), {"format": "pt"})
    file = weights.read(path)
    assert set(file.parts) == {"unet_lora"}
    assert weights.describe(file.parts) == "U-Net's LoRA"
    assert file.parts["unet_lora"].keys() == lora.state_dict().keys()
