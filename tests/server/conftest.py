"""A real ComfyUI server with this pack and tiny checkpoints, and the prompts that users build."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from cat_diffusion.cat_core import weights
from comfyui.local_server import LocalServer, make_base

CAT_PARTS = ("sem_inpainter", "ref_adapter")
ORIGIN = {"licence": "MIT", "provenance": "x"}
PHOTOS = {"photo.png": (64, 64), "odd.png": (75, 101), "large.png": (512, 512)}


@pytest.fixture(scope="session")
def base(tiny, tiny_file, tmp_path_factory):
    """ComfyUI's user folder: checkpoints good and bad, a photograph, a LoRA."""
    base = tmp_path_factory.mktemp("base")
    make_base(base)
    shutil.copytree(Path(__file__).parent / "helper_nodes", base / "custom_nodes/helper_nodes")
    folder = base / "models/cat_diffusion"
    write_good_files(folder, tiny, tiny_file)
    write_bad_files(folder, tiny, tiny_file, marker=base / "ran")
    save_file({"x": torch.rand(1)}, base / "models/outside.safetensors")
    write_lora(base / "models/loras/tiny.safetensors")
    write_photos(base / "input")
    return base


def write_good_files(folder, tiny, tiny_file):
    """Full checkpoints, and files of the CAT parts."""
    (folder / "sub").mkdir()
    shutil.copy(tiny_file, folder / "tiny.safetensors")
    shutil.copy(tiny_file, folder / "sub/tiny.safetensors")
    parts, architecture = tiny
    cat_parts = {part: parts[part] for part in CAT_PARTS}
    weights.write_cat_weights(folder / "cat.safetensors", cat_parts, architecture, **ORIGIN)
    for part, tensors in cat_parts.items():
        path = folder / f"{part}.safetensors"
        weights.write_cat_weights(path, {part: tensors}, architecture, **ORIGIN)
    lightning = {"state_dict": weights.flat(parts), "epoch": 7, "global_step": 40_000}
    torch.save(lightning, folder / "lightning.ckpt")


def write_bad_files(folder, tiny, tiny_file, marker):
    """Each is wrong in one way; `marker` appears if the code inside evil.ckpt runs."""
    parts, architecture = tiny
    official = weights.flat(parts)
    header = weights.cat_metadata(parts, architecture, **ORIGIN)
    (folder / "cut.safetensors").write_bytes(tiny_file.read_bytes()[:100_000])
    (folder / "empty.safetensors").touch()
    torch.save(official, folder / "mislabelled.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.rand(3)}, folder / "lora.safetensors")

    missing = dict(official)
    del missing["model.diffusion_model.out.2.bias"]
    save_file(missing, folder / "missing.safetensors", header)

    extra = official | {"first_stage_model.extra.bias": torch.rand(3)}
    save_file(extra, folder / "extra.safetensors", header)

    bias = official["fusion_model.post_layernorm.bias"].clone()
    bias[3] = float("nan")
    nan = official | {"fusion_model.post_layernorm.bias": bias}
    save_file(nan, folder / "nan.safetensors", header)

    torch.save({"state_dict": official, "callbacks": Evil(marker)}, folder / "evil.ckpt")


class Evil:
    """Unpickling it touches a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write_lora(path):
    """For one layer of the tiny U-Net."""
    path.parent.mkdir()
    layer = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    matrices = {
        f"{layer}.lora_up.weight": torch.randn(64, 4),
        f"{layer}.lora_down.weight": torch.randn(4, 64),
    }
    save_file(matrices, path)


def write_photos(folder):
    """The demo's photograph in three sizes, transparent where its hole is, and opaque."""
    photo = Image.open(ROOT / "web/photograph/photo.jpg")
    mask = Image.open(ROOT / "web/photograph/mask.png")
    for name, size in PHOTOS.items():
        picture = photo.resize(size).convert("RGBA")
        picture.putalpha(mask.resize(size).point(lambda value: 255 - value))
        picture.save(folder / name)
    photo.resize((64, 64)).save(folder / "opaque.png")


@pytest.fixture(scope="session")
def server(base):
    """The running server."""
    with LocalServer(base, "--cpu") as server:
        yield server


class Prompt(dict):
    """An API prompt that is easy to change."""

    def inputs(self, class_type):
        """The inputs of the first node of that class."""
        return next(node["inputs"] for node in self.values() if node["class_type"] == class_type)

    def add(self, name, class_type, **inputs):
        """Add a node; returns a link to its first output."""
        self[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    def relink(self, link, other):
        """Let all inputs that come from one output come from another."""
        for node in self.values():
            for name, value in node["inputs"].items():
                if value == link:
                    node["inputs"][name] = other

    def copy(self):
        return Prompt(copy.deepcopy(dict(self)))


@pytest.fixture
def example():
    """The example workflow as it is."""
    return Prompt(json.loads((ROOT / "workflows/api/cat_inpaint.json").read_text()))


@pytest.fixture
def prompt(example):
    """The example workflow on the tiny checkpoint and a small photograph.

    It also saves the latent.
    """
    example.inputs("CATLoadCheckpoint")["checkpoint"] = "tiny.safetensors"
    example.inputs("CATSamplePhoto")["image"] = "photo.png"
    example.inputs("ImageScaleToTotalPixels")["megapixels"] = 0.01
    example.inputs("KSampler")["steps"] = 2
    example.add("latent", "SaveLatent", samples=["10", 0], filename_prefix="latent")
    return example


@pytest.fixture
def run(server):
    """Run a prompt that must succeed; returns (PromptResult, latent tensor or None)."""

    def run(prompt, **kwargs):
        result = server.run(prompt, **kwargs)
        if result.error is not None:
            traceback = "".join(result.error["traceback"])
            pytest.fail(f"{result.error['exception_message']}\n{traceback}")
        saved = result.outputs.get("latent")
        if saved is None:
            return result, None
        path = server.image_path(saved["latents"][0])
        return result, load_file(path)["latent_tensor"]

    return run


@pytest.fixture
def picture(server):
    """Read a picture that a prompt saved, by default the workflow's own: (H, W, 3) integers."""

    def picture(result, node="17"):
        path = server.image_path(result.outputs[node]["images"][0])
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    return picture


@pytest.fixture
def error(server):
    """Run a prompt that must fail; returns (class of the node, message) as the dialog shows them.

    The dialog shows the full path of any class of errors but ValueError.
    """

    def error(prompt):
        result = server.run(prompt)
        assert result.error is not None
        assert result.error["exception_type"] == "ValueError"
        return result.error["node_type"], result.error["exception_message"].strip()

    return error
