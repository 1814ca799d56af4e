"""Real prompts through a real server: what users take for granted."""

import json
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image


def picture(server, result, node="17"):
    return np.asarray(
        Image.open(server.image_path(result.outputs[node]["images"][0])).convert("RGB")
    ).astype(int)


def photo(base, name="photo.png"):
    """(RGB, alpha) as integers."""
    rgba = np.asarray(Image.open(base / "input" / name)).astype(int)
    return rgba[..., :3], rgba[..., 3]


@pytest.mark.parametrize("name", ["photo.png", "odd.png", "large.png"])
def test_the_example_workflow_changes_the_hole_and_nothing_else(server, base, prompt, run, name):
    prompt.inputs("LoadImage")["image"] = name
    result, _ = run(prompt)
    made, (original, alpha) = picture(server, result), photo(base, name)
    assert made.shape == original.shape
    assert (made[alpha == 255] == original[alpha == 255]).all()
    assert np.abs(made[alpha == 0] - original[alpha == 0]).mean() > 5


def test_the_object_lands_where_the_hole_is(prompt, run):
    """Nothing is cropped on the way, whatever the photo's size; a crop would be stretched over the photo in the end."""
    for width, height in ((4000, 3000), (1920, 1080), (75, 101), (768, 1024)):
        image = prompt.add(
            "sized", "EmptyImage", width=width, height=height, batch_size=1, color=255
        )
        small = prompt.copy()
        small.inputs("ImageScaleToTotalPixels").update(image=image)
        for number in [number for number in small if number not in ("4", "sized")]:
            del small[number]
        small.add("save", "SaveImage", images=["4", 0], filename_prefix="scaled")
        result, _ = run(small)
        scaled = Image.open(run.server.image_path(result.outputs["save"]["images"][0]))
        assert scaled.width % 8 == 0 and scaled.height % 8 == 0
        assert abs(scaled.width / scaled.height / (width / height) - 1) < 0.1


CONTRACT = {
    "CATLoadCheckpoint": (["checkpoint"], ["MODEL", "CLIP", "VAE", "CLIP_VISION", "CAT_MODEL"]),
    "CATLoadWeights": (["weights"], ["CAT_MODEL"]),
    "CATSemanticInpaint": (
        ["cat_model", "clip_vision", "clip", "image", "mask", "text", "previous"],
        ["VISUAL_PROMPT"],
    ),
    "CATEncodeVisualPrompt": (["clip_vision", "image", "mask"], ["VISUAL_PROMPT"]),
    "CATApplyRefAdapter": (
        ["model", "cat_model", "visual_prompt", "strength", "start_percent", "end_percent"],
        ["MODEL"],
    ),
    "CATInpaintConditioning": (
        ["positive", "negative", "vae", "image", "mask", "fill", "noise_mask"],
        ["CONDITIONING", "CONDITIONING", "LATENT"],
    ),
    "CATScheduler": (["model", "steps", "denoise"], ["SIGMAS"]),
    "CATVisualPromptPreview": (["visual_prompt", "clip", "clip_vision"], ["IMAGE"]),
    "CATDemoScene": (["scene"], ["IMAGE", "MASK"]),
    "CATCompareFeatures": (
        ["cat_model", "clip_vision", "clip", "image", "mask", "text"],
        ["FLOAT", "FLOAT", "IMAGE"],
    ),
    "CATTrainSemInpainter": (
        [
            "clip_vision",
            "clip",
            "folder",
            "steps",
            "batch_size",
            "learning_rate",
            "masked_loss",
            "precision",
            "seed",
            "filename_prefix",
            "licence",
            "cat_model",
        ],
        ["CAT_MODEL", "IMAGE"],
    ),
    "CATTrainRefAdapter": (
        [
            "model",
            "clip_vision",
            "clip",
            "vae",
            "folder",
            "size",
            "steps",
            "batch_size",
            "micro_batch_size",
            "checkpointing",
            "learning_rate",
            "precision",
            "seed",
            "filename_prefix",
            "licence",
            "cat_model",
        ],
        ["CAT_MODEL", "IMAGE"],
    ),
}


def test_ids_and_orders_are_those_of_saved_workflows(server):
    info = {
        name: node for name, node in server.get("/object_info").items() if name.startswith("CAT")
    }
    assert info.keys() == CONTRACT.keys()
    for name, (inputs, outputs) in CONTRACT.items():
        given = {**info[name]["input"]["required"], **info[name]["input"].get("optional", {})}
        assert list(given) == inputs and info[name]["output"] == outputs
        assert info[name]["category"].split("/")[0] == "CAT-Diffusion"
        assert all(len(spec) > 1 and spec[1].get("tooltip") for spec in given.values()), name


def test_only_files_with_what_the_node_needs_are_offered(server):
    info = server.get("/object_info")
    checkpoints = info["CATLoadCheckpoint"]["input"]["required"]["checkpoint"][1]["options"]
    weights = info["CATLoadWeights"]["input"]["required"]["weights"][1]["options"]
    assert (
        "tiny.safetensors" in weights and "evil.ckpt" in checkpoints and "evil.ckpt" not in weights
    )
    assert any("sub" in name for name in checkpoints)
    assert {"sem_inpainter.safetensors", "ref_adapter.safetensors", "cat.safetensors"} <= set(
        weights
    )
    unusable = {
        "cut.safetensors",
        "empty.safetensors",
        "mislabelled.safetensors",
        "lora.safetensors",
    }
    assert not unusable & {*weights, *checkpoints} and "cat.safetensors" not in checkpoints


def test_queueing_again_reproduces_and_a_new_strength_reloads_nothing(prompt, run):
    _, latent = run(prompt)
    prompt.inputs("KSampler")["steps"] = 3
    run(prompt)
    prompt.inputs("KSampler")["steps"] = 2
    assert torch.equal(run(prompt)[1], latent)
    prompt.inputs("CATApplyRefAdapter")["strength"] = 0.5
    changed, other = run(prompt)
    assert not torch.equal(other, latent)
    assert {"8", "10"} <= set(changed.seconds) and not {"1", "7", "9"} & set(changed.seconds)


def test_another_seed_or_strength_runs_neither_clip_vision_nor_sem_inpainter_again(prompt, run):
    """By the server's own events: both run in CAT Semantic Inpaint, folding in CAT Apply RefAdapter."""

    def queue(node, **changes):
        cached, executed = set(), set()

        def note(kind, data):
            if kind == "execution_cached":
                cached.update(data["nodes"])
            elif kind == "executing" and data["node"] is not None:
                executed.add(data["node"])

        prompt.inputs(node).update(changes)
        return run(prompt, on_event=note)[1], cached, executed

    before, *_ = queue("KSampler", seed=4)
    number = {node["class_type"]: number for number, node in prompt.items()}
    each_time = {
        number[name]
        for name in ("KSampler", "VAEDecode", "ImageCompositeMasked", "SaveImage", "SaveLatent")
    }
    once = set(prompt) - each_time
    assert {
        number["CATLoadCheckpoint"],
        number["CATSemanticInpaint"],
        number["CATApplyRefAdapter"],
    } <= once
    for changes in ({"seed": 5}, {"steps": 3}, {"cfg": 2.0}):
        latent, cached, executed = queue("KSampler", **changes)
        assert not torch.equal(latent, before)
        assert once <= cached and executed == each_time
        before = latent
    _, cached, executed = queue("CATApplyRefAdapter", strength=0.5)
    again = {number["CATApplyRefAdapter"]}
    assert once - again <= cached and executed == each_time | again


def test_strength_0_equals_the_workflow_without_the_adapter(prompt, run):
    prompt.inputs("CATApplyRefAdapter")["strength"] = 0.0
    _, zero = run(prompt)
    prompt.inputs("KSampler")["model"] = ["1", 0]
    _, plain = run(prompt)
    assert torch.equal(zero, plain)


def test_parts_from_separate_files_give_the_same_picture(prompt, run):
    _, whole = run(prompt)
    prompt.inputs("CATSemanticInpaint")["cat_model"] = prompt.add(
        "sem", "CATLoadWeights", weights="sem_inpainter.safetensors"
    )
    prompt.inputs("CATApplyRefAdapter")["cat_model"] = prompt.add(
        "ref", "CATLoadWeights", weights="ref_adapter.safetensors"
    )
    result, parts = run(prompt)
    assert torch.equal(whole, parts)
    assert result.texts["sem"].endswith("SemInpainter") and result.texts["ref"].endswith(
        "RefAdapter"
    )
    prompt["sem"]["inputs"]["weights"] = "cat.safetensors"
    assert run(prompt)[0].texts["sem"].endswith("SemInpainter and RefAdapter")


def test_a_checkpoint_in_a_subfolder(prompt, run, server):
    options = server.get("/object_info/CATLoadCheckpoint")["CATLoadCheckpoint"]["input"][
        "required"
    ]["checkpoint"][1]["options"]
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = next(
        name for name in options if "sub" in name
    )
    run(prompt)


def test_an_official_pickled_checkpoint(prompt, run):
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "lightning.ckpt"
    assert run(prompt)[1].isfinite().all()


def test_lora_controlnet_and_two_adapters_on_one_model(prompt, run):
    _, plain = run(prompt)
    lora = prompt.add(
        "lora",
        "LoraLoaderModelOnly",
        model=["1", 0],
        lora_name="tiny.safetensors",
        strength_model=1.0,
    )
    prompt.inputs("CATApplyRefAdapter")["model"] = lora
    _, with_lora = run(prompt)
    control = prompt.add("control", "HelperControlNet", demo=False)
    prompt.add(
        "applied",
        "ControlNetApplyAdvanced",
        positive=["9", 0],
        negative=["9", 1],
        control_net=control,
        image=["4", 0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        vae=["1", 2],
    )
    prompt.inputs("KSampler")["positive"], prompt.inputs("KSampler")["negative"] = (
        ["applied", 0],
        ["applied", 1],
    )
    _, with_control = run(prompt)
    reference = prompt.add(
        "reference", "CATEncodeVisualPrompt", clip_vision=["1", 3], image=["2", 0]
    )
    prompt.add(
        "second",
        "CATApplyRefAdapter",
        model=["8", 0],
        cat_model=["1", 4],
        visual_prompt=reference,
        strength=0.7,
        start_percent=0.2,
        end_percent=0.9,
    )
    prompt.inputs("KSampler")["model"] = ["second", 0]
    _, with_two = run(prompt)
    latents = [plain, with_lora, with_control, with_two]
    assert all(latent.isfinite().all() for latent in latents)
    assert all(not torch.equal(a, b) for i, a in enumerate(latents) for b in latents[:i])


def test_the_lora_still_applies_after_the_adapter(prompt, run):
    """The other order: LoRA behind Apply RefAdapter."""
    _, plain = run(prompt)
    prompt.inputs("KSampler")["model"] = prompt.add(
        "lora",
        "LoraLoaderModelOnly",
        model=["8", 0],
        lora_name="tiny.safetensors",
        strength_model=1.0,
    )
    assert not torch.equal(run(prompt)[1], plain)


def test_the_official_schedule_through_sampler_custom(prompt, run):
    sampler = prompt.add("ddim", "KSamplerSelect", sampler_name="ddim")
    sigmas = prompt.add("sigmas", "CATScheduler", model=["8", 0], steps=4, denoise=1.0)
    prompt.add(
        "10",
        "SamplerCustom",
        model=["8", 0],
        add_noise=True,
        noise_seed=1,
        cfg=7.5,
        positive=["9", 0],
        negative=["9", 1],
        sampler=sampler,
        sigmas=sigmas,
        latent_image=["9", 2],
    )
    assert run(prompt)[1].isfinite().all()


@pytest.mark.parametrize("images, masks", [(3, 1), (1, 3), (2, 2)])
def test_batches_of_photos_and_masks(prompt, run, images, masks, server):
    image = prompt.add("images", "RepeatImageBatch", image=["2", 0], amount=images)
    as_image = prompt.add("mask image", "MaskToImage", mask=["2", 1])
    repeated = prompt.add("masks image", "RepeatImageBatch", image=as_image, amount=masks)
    mask = prompt.add("masks", "ImageToMask", image=repeated, channel="red")
    for name in ("CATSemanticInpaint", "CATInpaintConditioning"):
        prompt.inputs(name)["image"], prompt.inputs(name)["mask"] = image, mask
    result, latent = run(prompt)
    assert len(latent) == max(images, masks)


def test_a_mask_of_another_size(prompt, run):
    mask = prompt.add("solid", "SolidMask", value=1.0, width=33, height=17)
    for name in ("CATSemanticInpaint", "CATInpaintConditioning"):
        prompt.inputs(name)["mask"] = mask
    result, _ = run(prompt)
    assert "covers everything" in result.texts["7"]


def test_an_empty_mask_is_said_and_goes_on(prompt, run):
    prompt.inputs("LoadImage")["image"] = "opaque.png"
    result, _ = run(prompt)
    assert result.texts["7"].startswith(
        "The mask is empty: the visual prompt is just the photo's own features."
    )
    prompt.inputs("LoadImage")["image"] = "photo.png"
    assert "7" not in run(prompt)[0].texts


def test_features_are_compared_on_the_node(server, prompt, run):
    prompt.add("compare", "CATCompareFeatures", **prompt.inputs("CATSemanticInpaint"))
    for slot, name in enumerate(("observed", "predicted")):
        prompt.add(name, "PreviewAny", source=["compare", slot])
    prompt.add("plot", "PreviewImage", images=["compare", 2])
    seen = []
    result, _ = run(
        prompt,
        on_event=lambda kind, data: seen.append(data["node"]) if kind == "progress" else None,
    )
    observed, predicted = (
        float(result.outputs[name]["text"][0]) for name in ("observed", "predicted")
    )
    assert -1 < predicted < observed < 1  # a random SemInpainter is worse than none
    assert (
        f"in the hole: observed {observed:.3f}, predicted {predicted:.3f} ("
        in result.texts["compare"]
    )
    assert picture(server, result, "compare").shape == (240, 640, 3) and "compare" in seen
    assert (picture(server, result, "plot") == picture(server, result, "compare")).all()


def test_an_image_with_alpha_is_taken_as_rgb(prompt, run):
    _, plain = run(prompt)
    alpha = prompt.add("alpha", "JoinImageWithAlpha", image=["2", 0], alpha=["2", 1])
    prompt.inputs("CATSemanticInpaint")["image"] = alpha
    assert torch.equal(run(prompt)[1], plain)


def test_colours_out_of_range_are_clipped(prompt, run):
    bright = prompt.add("bright", "HelperImage", kind="bright")
    for name in ("CATSemanticInpaint", "CATInpaintConditioning"):
        prompt.inputs(name)["image"] = bright
    assert run(prompt)[1].isfinite().all()


def test_the_visual_prompt_of_a_one_pixel_photo(prompt, run):
    prompt.inputs("CATSemanticInpaint")["image"] = prompt.add(
        "dot", "EmptyImage", width=1, height=1, batch_size=1, color=0
    )
    assert run(prompt)[1].isfinite().all()


def test_cancel_stops_the_sampler_and_the_next_run_works(server, prompt, run):
    _, latent = run(prompt)
    prompt.inputs("KSampler")["steps"] = 1000
    stopped = []

    def cancel(kind, data):
        if kind == "progress" and data["max"] > 900 and not stopped:
            stopped.append(time.monotonic())
            threading.Thread(target=server.post, args=("/interrupt",)).start()

    assert server.run(prompt, cancel).interrupted
    assert time.monotonic() - stopped[0] < 20
    prompt.inputs("KSampler")["steps"] = 2
    prompt.inputs("KSampler")["seed"] = 0
    assert torch.equal(run(prompt)[1], latent)


def test_cancel_stops_a_long_batch_in_semantic_inpaint(server, prompt):
    prompt.inputs("CATSemanticInpaint")["image"] = prompt.add(
        "many", "RepeatImageBatch", image=["2", 0], amount=2000
    )
    seen = []

    def cancel(kind, data):
        if kind == "progress" and data.get("node") == "7":
            if not seen:
                threading.Thread(target=server.post, args=("/interrupt",)).start()
            seen.append(data["value"] / data["max"])

    assert server.run(prompt, cancel).interrupted
    assert max(seen) < 0.9  # it did not run to its end


def test_help_pages_are_served(server):
    for name in CONTRACT:
        for path in (f"{name}.md", f"{name}/zh.md"):
            page = (
                urllib.request.urlopen(f"{server.url}/extensions/cat-diffusion/docs/{path}")
                .read()
                .decode()
            )
            assert page.startswith("# ") and len(page) > 200


def test_the_pack_brings_no_dependency_and_no_heavy_import():
    """Importing the pack after ComfyUI's own nodes adds no third-party module."""
    import os
    import subprocess
    import sys

    code = """
import json, sys, os
sys.argv = ["main.py", "--cpu"]
sys.path[:0] = [os.environ["CAT_DIFFUSION_COMFYUI"], TOOLS]
import comfy.options; comfy.options.enable_args_parsing()
import utils.extra_config, server, nodes, execution  # main.py's order: nodes puts comfy/ before everything
before = set(sys.modules)
from comfyui import launch; launch.start_host()
import cat_diffusion.nodes.extension
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    code = code.replace("TOOLS", repr(str(ROOT / "tools")))
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert run.returncode == 0, run.stderr
    added = set(json.loads(run.stdout.strip().splitlines()[-1]))
    assert added <= {
        "cat_diffusion",
        "comfyui",
        "comfy",
        "comfy_api",
        "node_helpers",
        "tempfile",
        "zipfile",
    }, added
