"""Shared fixtures: the pack inside a real ComfyUI in this process, and tiny random checkpoints.

The host is set up here, before any test module is imported: they import the pack at their tops.
"""

import subprocess
import sys

import pytest
from paths import COMFYUI, ROOT

sys.path[:0] = [str(COMFYUI), str(ROOT / "tools")]

import dynamic_vram

from comfyui import install, launch

if "--dynamic-vram" in sys.argv:
    dynamic_vram.turn_on()
launch.start_host()


def pytest_addoption(parser):
    parser.addoption(
        "--dynamic-vram",
        action="store_true",
        help="with the host's dynamic VRAM, as far as a CPU can have it",
    )


@pytest.fixture(scope="session")
def tiny():
    """(parts, architecture) of a tiny random checkpoint in the official layout."""
    from demo_model.random_checkpoint import random_checkpoint

    with dynamic_vram.ordinary_layers():
        return random_checkpoint("tiny")


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory):
    """The tiny checkpoint as a safetensors file."""
    from cat_diffusion.cat_core import weights

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    weights.write_cat_weights(path, *tiny, licence="MIT", provenance="random")
    return path


@pytest.fixture(scope="session")
def full_file():
    """A full-size random checkpoint, fp16, kept in the cache (the demo's own)."""
    path = install.cache_dir() / "demo/models/cat_diffusion/random_weights_fp16.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, ROOT / "tools/run.py", "demo_model.random_checkpoint", path],
            check=True,
        )
    return path


@pytest.fixture(scope="session")
def pack():
    """The pack; launch.start_host has made it importable."""
