"""Losses and gradients of both stages equal the official implementation's."""

import json

import pytest
import torch
from paths import GOLDENS
from safetensors.torch import load_file

from cat_diffusion.cat_core import features, weights
from cat_diffusion.cat_core.training.objectives import (
    Diffusion,
    Distillation,
    add_noise,
    combine,
    stable_diffusion_schedule,
)
from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
from official.golden_cases import Goldens


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDENS / "losses.safetensors")
    return {key.removeprefix("in."): value for key, value in tensors.items()}


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDENS / "losses.json").read_text())


@pytest.fixture
def sem_inpainter():
    """SemInpainter with the golden weights."""
    return trainable("fusion_tiny.safetensors", "sem_inpainter")


@pytest.fixture
def denoiser_of():
    """Makes a denoiser with the golden weights."""

    def denoiser_of(checkpointing=False):
        file = Goldens(GOLDENS).checkpoint("unet_tiny.safetensors")
        ref_adapter = trainable("unet_tiny.safetensors", "ref_adapter")
        return Denoiser(trainable_unet(file), ref_adapter, checkpointing)

    return denoiser_of


def trainable(name, part):
    """A part of a golden file as the core's own module."""
    file = Goldens(GOLDENS).checkpoint(name)
    module = weights.cat_modules(file.architecture)[part]
    module.load_state_dict({key: tensor.clone() for key, tensor in file.parts[part].items()})
    return module


@pytest.fixture
def batch(golden):
    return {
        "patches": golden["clip_x"][:, 1:],
        "image": golden["global_clip_x"][:, 0],
        "text": golden["prompt_pool"][:, 0],
        "patch_mask": golden["mask16"].long(),
        "teacher_patches": golden["teacher_clip"][:, 1:],
        "teacher_image": golden["teacher_global"][:, 0],
        "latent": golden["x_start"],
        "noise": golden["noise"],
        "timestep": golden["timesteps"],
        "context": golden["context"],
        "latent_mask": golden["mask"].unsqueeze(1),
        "masked_latent": golden["masked_latent"],
    }


def loss_of(objective, batch):
    terms, _ = objective(batch)
    totals = {name: weight.sum() for name, weight in objective.weights(batch).items()}
    return combine(objective, terms, totals)


def check_gradients(module, expected):
    norms = {}
    for key, parameter in module.named_parameters():
        if parameter.grad is not None:
            norms[key] = parameter.grad.norm().item()
    assert norms.keys() == expected.keys()
    total = max(expected.values())
    for key, norm in expected.items():
        assert abs(norms[key] - norm) <= 2e-5 * max(norm, 1e-3 * total), key


@pytest.fixture(autouse=True)
def gradients():
    """Training runs outside the inference mode that the other node tests use."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def test_distillation(sem_inpainter, batch, golden, expected):
    loss = loss_of(Distillation(sem_inpainter), batch)
    official = expected["stage1_distillation"]
    assert abs(loss.item() - official["loss"]) <= 1e-5 * official["loss"]
    loss.backward()
    check_gradients(sem_inpainter, official["grad_per_parameter"]["fusion"])
    for key in (
        "embeddings.mask_embedding.weight",
        "encoder.layers.1.self_attn.q_proj.weight",
        "label_mlp.fc1.weight",
    ):
        close(sem_inpainter.get_parameter(key).grad, golden[f"grad.stage1.{key}"])


def test_the_masked_form_counts_masked_patches_only(sem_inpainter, batch):
    """Against the error of each patch, summed over the hole by hand."""
    masked, _ = Distillation(sem_inpainter, masked=True)(batch)
    whole, watched = Distillation(sem_inpainter)(batch)
    assert set(watched) == {"cosine", "cosine_observed"}
    assert torch.equal(masked["image"], whole["image"])

    predicted = sem_inpainter(
        batch["patches"], batch["image"], batch["text"], batch["patch_mask"]
    ).patches
    error = ((predicted - batch["teacher_patches"]) ** 2).mean(2)  # (B, N)
    for row, hole in enumerate(batch["patch_mask"].flatten(1).bool()):
        assert 0 < hole.sum() < len(hole)
        assert masked["patches"][row].item() == pytest.approx(error[row][hole].sum().item())
        assert whole["patches"][row].item() == pytest.approx(error[row].sum().item())
    assert (masked["patches"] < whole["patches"]).all()


def test_a_hole_of_everything_makes_both_forms_one(sem_inpainter, batch):
    everything = {**batch, "patch_mask": torch.ones_like(batch["patch_mask"])}
    masked, _ = Distillation(sem_inpainter, masked=True)(everything)
    whole, _ = Distillation(sem_inpainter)(everything)
    assert masked["patches"].shape == (2,)
    assert torch.equal(masked["patches"], whole["patches"])


@pytest.mark.parametrize("stage, uses", [("stage2_eps", True), ("stage1_unet_only_eps", False)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_diffusion(sem_inpainter, denoiser_of, batch, golden, expected, stage, uses, checkpointing):
    denoiser = denoiser_of(checkpointing)
    objective = Diffusion(denoiser, stable_diffusion_schedule(), sem_inpainter if uses else None)
    loss = loss_of(objective, batch)
    official = expected[stage]
    assert abs(loss.item() - official["loss"]) <= 1e-5 * official["loss"]
    loss.backward()
    norms = official["grad_per_parameter"]
    check_gradients(denoiser.ref_adapter, norms["refadapter(attn3,norm4)"])
    check_gradients(denoiser.unet, norms["unet_pretrained"])
    if uses:
        check_gradients(sem_inpainter, norms["fusion"])
        key = "embeddings.mask_embedding.weight"
        close(sem_inpainter.get_parameter(key).grad, golden[f"grad.stage2.fusion.{key}"])
        key = "input_blocks.1.1.transformer_blocks.0.attn3.to_k.weight"
        close(denoiser.ref_adapter.get_parameter(key).grad, golden[f"grad.stage2.unet.{key}"])
    else:
        assert all(parameter.grad is None for parameter in sem_inpainter.parameters())


def test_the_noise_and_the_schedule(batch, golden):
    schedule = stable_diffusion_schedule()
    close(schedule, load_file(GOLDENS / "ddim.safetensors")["schedule.alphas_cumprod"])
    noisy = add_noise(batch["latent"], batch["noise"], schedule[batch["timestep"]])
    close(noisy, golden["mid.x_noisy"])


def test_dropped_rows_see_no_visual_prompt(sem_inpainter, denoiser_of, batch):
    objective = Diffusion(denoiser_of(), stable_diffusion_schedule(), sem_inpainter)
    prompt = objective.visual_prompt({**batch, "dropped": torch.tensor([True, False])})
    assert not prompt[0].any()
    assert prompt[1].any()


def test_the_visual_prompt_may_show_the_hole(denoiser_of, batch):
    """The ablation without SemInpainter.

    It takes what CLIP sees of the picture with its hole, instead of the whole one.
    """
    denoiser = denoiser_of()
    schedule = stable_diffusion_schedule()
    whole = Diffusion(denoiser, schedule).visual_prompt(batch)
    observed = Diffusion(denoiser, schedule, observed=True).visual_prompt(batch)
    assert torch.equal(whole, features.pool(batch["teacher_patches"]))
    assert torch.equal(observed, features.pool(batch["patches"]))
    assert not torch.equal(whole, observed)


def close(tensor, golden):
    assert tensor.shape == golden.shape
    assert (tensor - golden).abs().max() <= 1e-5 * golden.abs().max()
