"""The full SD 1.5 architecture on a real photograph, through the real server: random weights, fp16 storage."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def full(full_file, tmp_path_factory):
    """A server whose folders hold the checkpoint whole, and split by tools/convert.py."""
    from comfyui.local_server import LocalServer, make_base

    base = tmp_path_factory.mktemp("full")
    make_base(base)
    whole = base / "models/cat_diffusion/whole.safetensors"
    try:
        whole.symlink_to(full_file)
    except OSError:
        shutil.copy(full_file, whole)
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/convert.py",
            full_file,
            "--base",
            base / "models/checkpoints/base.safetensors",
            "--cat-weights",
            base / "models/cat_diffusion/cat.safetensors",
            "--clip-vision",
            base / "models/clip_vision/vision.safetensors",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    photo, mask = (
        Image.open(ROOT / "tools/photograph" / name) for name in ("photo.jpg", "mask.png")
    )
    photo = photo.convert("RGBA")
    photo.putalpha(mask.point(lambda value: 255 - value))
    photo.save(base / "input/photo.png")
    with LocalServer(
        base, "--cpu", "--use-pytorch-cross-attention", "--verbose", "DEBUG"
    ) as server:
        yield server
    shutil.rmtree(base)  # gigabytes


def finished(server, prompt):
    run = server.run(prompt)
    assert run.error is None, run.error["exception_message"]
    print({prompt[node]["class_type"]: round(seconds, 1) for node, seconds in run.seconds.items()})
    return run


def test_the_example_workflow_at_512_pixels(full, prompt):
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "whole.safetensors"
    prompt.inputs("ImageScaleToTotalPixels")["megapixels"] = 0.25
    run = finished(full, prompt)
    latent = load_file(full.image_path(run.outputs["latent"]["latents"][0]))["latent_tensor"]
    assert latent.shape == (1, 4, 64, 64) and latent.isfinite().all()
    made = np.asarray(
        Image.open(full.image_path(run.outputs["17"]["images"][0])).convert("RGB")
    ).astype(int)
    rgba = np.asarray(Image.open(full.base / "input/photo.png")).astype(int)
    outside, inside = rgba[..., 3] == 255, rgba[..., 3] == 0
    assert made.shape == (512, 512, 3)
    assert (made[outside] == rgba[outside][:, :3]).all()
    assert np.abs(made[inside] - rgba[inside][:, :3]).mean() > 5
    assert made[inside].std() > 5


def test_the_split_checkpoint_loads_with_stock_loaders_and_gives_the_same_latent(full, prompt):
    """CheckpointLoaderSimple, CLIPVisionLoader and CATLoadWeights against CATLoadCheckpoint, 128x128, one step."""
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "whole.safetensors"
    prompt.inputs("ImageScaleToTotalPixels")["megapixels"] = 0.02
    prompt.inputs("KSampler").update(steps=1, scheduler="normal", sampler_name="euler")
    whole = finished(full, prompt)
    stock = prompt.copy()
    del stock["1"]
    stock.add("base", "CheckpointLoaderSimple", ckpt_name="base.safetensors")
    stock.add("vision", "CLIPVisionLoader", clip_name="vision.safetensors")
    stock.add("cat", "CATLoadWeights", weights="cat.safetensors")
    links = {0: ["base", 0], 1: ["base", 1], 2: ["base", 2], 3: ["vision", 0], 4: ["cat", 0]}
    for node in stock.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == "1":
                node["inputs"][name] = links[value[1]]
    split = finished(full, stock)
    latents = [
        load_file(full.image_path(run.outputs["latent"]["latents"][0]))["latent_tensor"]
        for run in (whole, split)
    ]
    assert torch.equal(*latents)
    log = full.log.read_text()
    for line in log.splitlines():
        for word in (
            "left over keys",
            "unet unexpected",
            "unet missing",
            "clip missing",
            "clip unexpected",
            "Missing VAE",
            "Leftover VAE",
        ):
            assert word not in line or not any(
                key in line for key in ("attn3", "norm4", "fusion_model", "cond_stage_model2")
            ), line
    assert (
        "unet unexpected" not in log and "unet missing" not in log and "Missing VAE keys" not in log
    )
