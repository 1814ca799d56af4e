"""A real ComfyUI server with this pack and tiny checkpoints, and the prompts that users would build."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from paths import ROOT
from PIL import Image


@pytest.fixture(scope="session")
def base(tiny, tiny_file, tmp_path_factory):
    """ComfyUI's user folder: checkpoints good and bad, a photograph, a LoRA."""
    import torch
    from safetensors.torch import save_file

    from cat_diffusion.cat_core import weights
    from comfyui.local_server import make_base

    base = tmp_path_factory.mktemp("base")
    make_base(base)
    shutil.copytree(Path(__file__).parent / "helper_nodes", base / "custom_nodes/helper_nodes")
    folder = base / "models/cat_diffusion"
    shutil.copy(tiny_file, folder / "tiny.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(tiny_file, folder / "sub/tiny.safetensors")
    parts, architecture = tiny
    for part in ("sem_inpainter", "ref_adapter"):
        weights.write_cat_weights(
            folder / f"{part}.safetensors",
            {part: parts[part]},
            architecture,
            licence="MIT",
            provenance="x",
        )
    weights.write_cat_weights(
        folder / "cat.safetensors",
        {part: parts[part] for part in ("sem_inpainter", "ref_adapter")},
        architecture,
        licence="MIT",
        provenance="x",
    )
    official = weights.flat(parts)
    (folder / "cut.safetensors").write_bytes(tiny_file.read_bytes()[:100_000])
    (folder / "empty.safetensors").touch()
    torch.save(official, folder / "mislabelled.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.rand(3)}, folder / "lora.safetensors")
    gone = "model.diffusion_model.out.2.bias"
    header = weights.cat_metadata(parts, architecture, licence="MIT", provenance="x")
    save_file(
        {key: tensor for key, tensor in official.items() if key != gone},
        folder / "missing.safetensors",
        header,
    )
    save_file(
        official | {"first_stage_model.extra.bias": torch.rand(3)},
        folder / "extra.safetensors",
        header,
    )
    broken = official["fusion_model.post_layernorm.bias"].clone()
    broken[3] = float("nan")
    save_file(
        official | {"fusion_model.post_layernorm.bias": broken}, folder / "nan.safetensors", header
    )
    torch.save({"state_dict": official, "callbacks": Evil(base / "ran")}, folder / "evil.ckpt")
    torch.save(
        {"state_dict": official, "epoch": 7, "global_step": 40_000}, folder / "lightning.ckpt"
    )
    save_file({"x": torch.rand(1)}, base / "models/outside.safetensors")

    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    (base / "models/loras").mkdir()
    save_file(
        {
            f"{name}.lora_up.weight": torch.randn(64, 4),
            f"{name}.lora_down.weight": torch.randn(4, 64),
        },
        base / "models/loras/tiny.safetensors",
    )

    photo, mask = (
        Image.open(ROOT / "tools/photograph" / name) for name in ("photo.jpg", "mask.png")
    )
    for name, size in (("photo.png", (64, 64)), ("odd.png", (75, 101)), ("large.png", (512, 512))):
        picture = photo.resize(size).convert("RGBA")
        picture.putalpha(mask.resize(size).point(lambda value: 255 - value))
        picture.save(base / "input" / name)
    photo.resize((64, 64)).save(base / "input/opaque.png")
    return base


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="session")
def server(base):
    """The running server."""
    from comfyui.local_server import LocalServer

    with LocalServer(base, "--cpu") as server:
        yield server


@pytest.fixture
def prompt():
    """The example workflow on the tiny checkpoint and a small photograph; also saves the latent."""
    prompt = json.loads((ROOT / "workflows/api/cat_inpaint.json").read_text())
    by_class = {}
    for number, node in prompt.items():
        by_class.setdefault(node["class_type"], node["inputs"])
    by_class["CATLoadCheckpoint"]["checkpoint"] = "tiny.safetensors"
    by_class["LoadImage"]["image"] = "photo.png"
    by_class["ImageScaleToTotalPixels"]["megapixels"] = 0.01
    by_class["KSampler"]["steps"] = 2
    prompt["latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": ["10", 0], "filename_prefix": "latent"},
    }
    return Prompt(prompt)


class Prompt(dict):
    """An API prompt that is easy to change."""

    def inputs(self, class_type):
        """The inputs of the first node of that class."""
        return next(node["inputs"] for node in self.values() if node["class_type"] == class_type)

    def add(self, name, class_type, **inputs):
        """Add a node; returns a link to its first output."""
        self[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    def copy(self):
        return Prompt(copy.deepcopy(dict(self)))


@pytest.fixture
def run(server, base):
    """Run a prompt that must succeed; returns (Run, latent tensor)."""
    from safetensors.torch import load_file

    def run(prompt, **kwargs):
        result = server.run(prompt, **kwargs)
        assert result.error is None, (
            result.error["exception_message"] + "\n" + "".join(result.error["traceback"])
        )
        latent = result.outputs.get("latent")
        return result, load_file(server.image_path(latent["latents"][0]))[
            "latent_tensor"
        ] if latent else None

    run.server = server
    return run


@pytest.fixture
def error(server):
    """Run a prompt that must fail; returns (class of the node, message) as the error dialog shows them."""

    def error(prompt):
        result = server.run(prompt)
        assert result.error is not None
        assert (
            result.error["exception_type"] == "ValueError"
        )  # the dialog shows the full path of any other class
        return result.error["node_type"], result.error["exception_message"].strip()

    return error
