"""Shared fixtures: the pack inside a real ComfyUI in this process, and tiny random checkpoints."""

import os
import sys

import dynamic_vram
import pytest
from paths import COMFYUI, ROOT

sys.path[:0] = [str(COMFYUI), str(ROOT / "tools")]
sys.path.append(str(ROOT))  # for cat_core on its own; last, since ComfyUI has a module called nodes too


def pytest_addoption(parser):
    parser.addoption("--dynamic-vram", action="store_true", help="with the host's dynamic VRAM, as far as a CPU can have it")


def pytest_configure(config):
    if config.getoption("--dynamic-vram"):
        dynamic_vram.turn_on()


@pytest.fixture(scope="session")
def pack():
    """The pack, loaded into a real ComfyUI in this process, on the CPU."""
    import inside

    return inside.load_pack()


@pytest.fixture(scope="session")
def tiny(pack):
    """(parts, architecture) of a tiny random checkpoint in the official layout."""
    from random_checkpoint import random_checkpoint

    with dynamic_vram.ordinary_layers():
        return random_checkpoint("tiny")


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory):
    """The tiny checkpoint as a safetensors file."""
    from cat_core import weights

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    weights.write_cat_weights(path, *tiny, licence="MIT", provenance="random")
    return path


@pytest.fixture(scope="session")
def full_file():
    """A full-size random checkpoint, fp16, kept in the cache (the demo's own)."""
    import subprocess

    import host

    path = host.cache_dir() / "demo/models/cat_diffusion/random_weights_fp16.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, ROOT / "tools/random_checkpoint.py", path], check=True, env=os.environ)
    return path
