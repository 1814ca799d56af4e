"""What saved workflows, browsers and other packs rely on: ids, orders, lists, pages, imports."""

import json
import os
import subprocess
import sys
import urllib.request

from paths import ROOT

# Node id -> its inputs and the types of its outputs, both in order.
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
        [
            "positive",
            "negative",
            "vae",
            "image",
            "mask",
            "fill",
            "noise_mask",
            "posterior",
            "posterior_seed",
        ],
        ["CONDITIONING", "CONDITIONING", "LATENT"],
    ),
    "CATCropAroundMask": (["image", "mask", "size", "context"], ["IMAGE", "MASK", "CAT_CROP"]),
    "CATStitch": (["crop", "image", "soft_edge"], ["IMAGE"]),
    "CATScheduler": (["model", "steps", "denoise"], ["SIGMAS"]),
    "CATVisualPromptPreview": (["visual_prompt", "clip", "clip_vision"], ["IMAGE"]),
    "CATVisualPromptToClipVision": (["visual_prompt", "clip_vision"], ["CLIP_VISION_OUTPUT"]),
    "CATDemoScene": (["scene"], ["IMAGE", "MASK"]),
    "CATSamplePhoto": (["image"], ["IMAGE", "MASK"]),
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


def choices(info, node, name):
    """What a combo input offers."""
    return info[node]["input"]["required"][name][1]["options"]


def test_ids_and_orders_are_those_of_saved_workflows(server):
    info = server.get("/object_info")
    assert {name for name in info if name.startswith("CAT")} == set(CONTRACT)
    for name, (inputs, outputs) in CONTRACT.items():
        schema = info[name]["input"]
        given = {**schema["required"], **schema.get("optional", {})}
        assert list(given) == inputs
        assert info[name]["output"] == outputs
        assert info[name]["category"].split("/")[0] == "CAT-Diffusion"
        for spec in given.values():
            assert len(spec) > 1, name
            assert spec[1].get("tooltip"), name


def test_only_files_with_what_the_node_needs_are_offered(server):
    info = server.get("/object_info")
    checkpoints = choices(info, "CATLoadCheckpoint", "checkpoint")
    weights = choices(info, "CATLoadWeights", "weights")
    cat_files = {"sem_inpainter.safetensors", "ref_adapter.safetensors", "cat.safetensors"}
    assert {"tiny.safetensors", *cat_files} <= set(weights)
    assert "cat.safetensors" not in checkpoints
    assert any("sub" in name for name in checkpoints)
    assert "evil.ckpt" in checkpoints  # what a pickle holds only reading it tells
    assert "evil.ckpt" not in weights
    for name in ("cut", "empty", "mislabelled", "lora"):
        assert f"{name}.safetensors" not in checkpoints
        assert f"{name}.safetensors" not in weights


def test_help_pages_are_served(server):
    for name in CONTRACT:
        for path in (f"{name}.md", f"{name}/zh.md"):
            address = f"{server.url}/extensions/cat-diffusion/docs/{path}"
            page = urllib.request.urlopen(address).read().decode()
            assert page.startswith("# ")
            assert len(page) > 200


IMPORTING = """
import json, sys, os
sys.argv = ["main.py", "--cpu"]
sys.path[:0] = [os.environ["CAT_DIFFUSION_COMFYUI"], sys.stdin.read()]
import comfy.options; comfy.options.enable_args_parsing()
# In main.py's order: nodes puts comfy/ before everything.
import utils.extra_config, server, nodes, execution
before = set(sys.modules)
from comfyui import launch; launch.start_host()
import cat_diffusion.nodes.extension
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_pack_brings_no_dependency_and_no_heavy_import():
    """Importing the pack after ComfyUI's own nodes adds no third-party module."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        input=str(ROOT / "tools"),
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert run.returncode == 0, run.stderr
    added = set(json.loads(run.stdout.strip().splitlines()[-1]))
    ours = {"cat_diffusion", "comfyui"}
    the_hosts = {"comfy", "comfy_api", "node_helpers"}
    pythons = {"tempfile", "zipfile"}
    assert added <= ours | the_hosts | pythons, added
