"""The full SD 1.5 architecture on a real photograph, through the real server.

Random weights, stored in fp16.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file

from comfyui.local_server import LocalServer, make_base
from demo_model.showcase import CPU_OPTIONS

pytestmark = pytest.mark.full

# Words of the host's log where a file does not fit the model that it is loaded into.
MISFITS = (
    "left over keys",
    "unet unexpected",
    "unet missing",
    "clip missing",
    "clip unexpected",
    "Missing VAE",
    "Leftover VAE",
)
CAT_KEYS = ("attn3", "norm4", "fusion_model", "cond_stage_model2")


@pytest.fixture(scope="module")
def full(full_file, tmp_path_factory):
    """A server whose folders hold the checkpoint whole, and split by tools/convert.py."""
    base = tmp_path_factory.mktemp("full")
    make_base(base)
    whole = base / "models/cat_diffusion/whole.safetensors"
    try:
        whole.symlink_to(full_file)
    except OSError:
        shutil.copy(full_file, whole)
    split(full_file, base / "models")
    photo = Image.open(ROOT / "web/photograph/photo.jpg").convert("RGBA")
    mask = Image.open(ROOT / "web/photograph/mask.png")
    photo.putalpha(mask.point(lambda value: 255 - value))
    photo.save(base / "input/photo.png")
    with LocalServer(base, *CPU_OPTIONS, "--verbose", "DEBUG") as server:
        yield server
    shutil.rmtree(base)  # gigabytes


def split(checkpoint, models):
    """Write what the stock loaders and CAT Load Weights read."""
    command = [sys.executable, ROOT / "tools/convert.py", checkpoint]
    command += ["--base", models / "checkpoints/base.safetensors"]
    command += ["--cat-weights", models / "cat_diffusion/cat.safetensors"]
    command += ["--clip-vision", models / "clip_vision/vision.safetensors"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def finished(server, prompt):
    """Run a prompt that must succeed, and print where the time went."""
    result = server.run(prompt)
    assert result.error is None, result.error["exception_message"]
    for node, seconds in result.seconds.items():
        print(f"{prompt[node]['class_type']}: {seconds:.1f} s")
    return result


def latent_of(server, result):
    saved = result.outputs["latent"]["latents"][0]
    return load_file(server.image_path(saved))["latent_tensor"]


def test_the_example_workflow_at_512_pixels(full, prompt):
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "whole.safetensors"
    prompt.inputs("ImageScaleToTotalPixels")["megapixels"] = 0.25
    result = finished(full, prompt)
    latent = latent_of(full, result)
    assert latent.shape == (1, 4, 64, 64)
    assert latent.isfinite().all()
    saved = Image.open(full.image_path(result.outputs["17"]["images"][0]))
    made = np.asarray(saved.convert("RGB")).astype(int)
    rgba = np.asarray(Image.open(full.base / "input/photo.png")).astype(int)
    photo = rgba[..., :3]
    outside = rgba[..., 3] == 255
    inside = rgba[..., 3] == 0
    assert made.shape == (512, 512, 3)
    assert (made[outside] == photo[outside]).all()
    assert np.abs(made[inside] - photo[inside]).mean() > 5
    assert made[inside].std() > 5


def test_the_split_checkpoint_loads_with_stock_loaders_and_gives_the_same_latent(full, prompt):
    """128x128, one step: the stock loaders and CATLoadWeights against CATLoadCheckpoint."""
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "whole.safetensors"
    prompt.inputs("ImageScaleToTotalPixels")["megapixels"] = 0.02
    prompt.inputs("KSampler").update(steps=1, scheduler="normal", sampler_name="euler")
    whole = latent_of(full, finished(full, prompt))
    stock = with_stock_loaders(prompt)
    assert torch.equal(latent_of(full, finished(full, stock)), whole)

    log = full.log.read_text()
    for line in log.splitlines():
        if any(word in line for word in MISFITS):
            assert not any(key in line for key in CAT_KEYS), line
    assert "unet unexpected" not in log
    assert "unet missing" not in log
    assert "Missing VAE keys" not in log


def with_stock_loaders(prompt):
    """A copy in which three other loaders stand for CATLoadCheckpoint, node 1."""
    stock = prompt.copy()
    del stock["1"]
    stock.add("base", "CheckpointLoaderSimple", ckpt_name="base.safetensors")
    stock.add("vision", "CLIPVisionLoader", clip_name="vision.safetensors")
    stock.add("cat", "CATLoadWeights", weights="cat.safetensors")
    places = [["base", 0], ["base", 1], ["base", 2], ["vision", 0], ["cat", 0]]
    for node in stock.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == "1":
                node["inputs"][name] = places[value[1]]
    return stock
