"""Losses and gradients of both stages equal the official implementation's."""

import json

import pytest
import torch
from paths import GOLDENS
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def golden():
    return {
        key.removeprefix("in."): value
        for key, value in load_file(GOLDENS / "losses.safetensors").items()
    }


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDENS / "losses.json").read_text())


@pytest.fixture(scope="module")
def modules(pack):
    """SemInpainter and denoiser with the golden weights."""
    from cat_diffusion.cat_core import weights
    from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
    from official import golden_cases

    def build(checkpointing=False):
        cases = golden_cases.Cases(GOLDENS)
        files = [cases._file(name) for name in ("fusion_tiny.safetensors", "unet_tiny.safetensors")]
        built = [
            weights.cat_modules(file.architecture)[part]
            for file, part in zip(files, ("sem_inpainter", "ref_adapter"))
        ]
        for module, file, part in zip(built, files, ("sem_inpainter", "ref_adapter")):
            module.load_state_dict(
                {key: tensor.clone() for key, tensor in file.parts[part].items()}
            )
        return built[0], Denoiser(trainable_unet(files[1]), built[1], checkpointing)

    return build


def batch_of(golden):
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
    from cat_diffusion.cat_core.training.loop import combine

    terms, _ = objective(batch)
    return combine(
        objective, terms, {name: weight.sum() for name, weight in objective.weights(batch).items()}
    )


def check_gradients(module, expected, names=lambda key: key):
    found = {
        names(key): parameter.grad.norm().item()
        for key, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    assert found.keys() == expected.keys()
    total = max(expected.values())
    for key, norm in expected.items():
        assert abs(found[key] - norm) <= 2e-5 * max(norm, 1e-3 * total), key


@pytest.fixture(autouse=True)
def gradients():
    """Training runs outside the inference mode that the other node tests use."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def test_distillation(modules, golden, expected):
    from cat_diffusion.cat_core.training.objectives import Distillation

    sem_inpainter, _ = modules()
    loss = loss_of(Distillation(sem_inpainter), batch_of(golden))
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


def test_the_masked_form_counts_masked_patches_only(modules, golden):
    from cat_diffusion.cat_core.training.objectives import Distillation

    sem_inpainter, _ = modules()
    batch = batch_of(golden)
    masked, _ = Distillation(sem_inpainter, masked=True)(batch)
    whole, watched = Distillation(sem_inpainter)(batch)
    assert (masked["patches"] < whole["patches"]).all() and torch.equal(
        masked["image"], whole["image"]
    )
    everything, _ = Distillation(sem_inpainter, masked=True)(
        {**batch, "patch_mask": batch["patch_mask"] * 0 + 1}
    )
    assert everything["patches"].shape == (2,) and set(watched) == {"cosine", "cosine_observed"}


@pytest.mark.parametrize("stage, uses", [("stage2_eps", True), ("stage1_unet_only_eps", False)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_diffusion(modules, golden, expected, stage, uses, checkpointing):
    from cat_diffusion.cat_core.training.objectives import Diffusion, stable_diffusion_schedule

    sem_inpainter, denoiser = modules(checkpointing)
    objective = Diffusion(denoiser, stable_diffusion_schedule(), sem_inpainter if uses else None)
    loss = loss_of(objective, batch_of(golden))
    official = expected[stage]
    assert abs(loss.item() - official["loss"]) <= 1e-5 * official["loss"]
    loss.backward()
    check_gradients(denoiser.ref_adapter, official["grad_per_parameter"]["refadapter(attn3,norm4)"])
    check_gradients(denoiser.unet, official["grad_per_parameter"]["unet_pretrained"])
    if uses:
        check_gradients(sem_inpainter, official["grad_per_parameter"]["fusion"])
        key = "embeddings.mask_embedding.weight"
        close(sem_inpainter.get_parameter(key).grad, golden[f"grad.stage2.fusion.{key}"])
        key = "input_blocks.1.1.transformer_blocks.0.attn3.to_k.weight"
        close(denoiser.ref_adapter.get_parameter(key).grad, golden[f"grad.stage2.unet.{key}"])
    else:
        assert all(parameter.grad is None for parameter in sem_inpainter.parameters())


def test_the_noise_and_the_schedule(golden):
    from cat_diffusion.cat_core.training import objectives

    schedule = objectives.stable_diffusion_schedule()
    close(schedule, load_file(GOLDENS / "ddim.safetensors")["schedule.alphas_cumprod"])
    batch = batch_of(golden)
    close(
        objectives.add_noise(batch["latent"], batch["noise"], schedule[batch["timestep"]]),
        golden["mid.x_noisy"],
    )


def test_dropped_rows_see_no_visual_prompt(modules, golden):
    from cat_diffusion.cat_core.training.objectives import Diffusion, stable_diffusion_schedule

    sem_inpainter, denoiser = modules()
    objective = Diffusion(denoiser, stable_diffusion_schedule(), sem_inpainter)
    prompt = objective.visual_prompt({**batch_of(golden), "dropped": torch.tensor([True, False])})
    assert not prompt[0].any() and prompt[1].any()


def test_the_visual_prompt_may_show_the_hole(modules, golden):
    """The ablation without SemInpainter: what CLIP sees of the picture with its hole, instead of the whole one."""
    from cat_diffusion.cat_core import features
    from cat_diffusion.cat_core.training.objectives import Diffusion, stable_diffusion_schedule

    _, denoiser = modules()
    batch = batch_of(golden)
    whole, observed = (
        Diffusion(denoiser, stable_diffusion_schedule(), observed=which).visual_prompt(batch)
        for which in (False, True)
    )
    assert torch.equal(whole, features.pool(batch["teacher_patches"])) and torch.equal(
        observed, features.pool(batch["patches"])
    )
    assert not torch.equal(whole, observed)


def close(found, golden):
    assert found.shape == golden.shape
    assert (found - golden).abs().max() <= 1e-5 * golden.abs().max()
