"""Shared fixtures: the pack inside a real ComfyUI in this process, and random checkpoints.

The host is set up here, before any test module is imported: they import the pack at their tops.
"""

import os
import signal
import sys

import hypothesis
import pytest
from paths import COMFYUI, ROOT

sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(COMFYUI))

import dynamic_vram
import utils.install_util  # noqa: F401 - as main.py: the host's nodes put comfy/utils.py before it

from comfyui import launch

# Started in the background, Python ignores Ctrl-C, and so would the tools that tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before the host's settings are read, which is at the first import of its parts. The processes of
# pytest-xdist do not see the command line, but the environment.
DYNAMIC_VRAM = "CAT_DIFFUSION_TEST_DYNAMIC_VRAM"
if "--dynamic-vram" in sys.argv:
    os.environ[DYNAMIC_VRAM] = "1"
if DYNAMIC_VRAM in os.environ:
    dynamic_vram.turn_on()
launch.start_host()

from cat_diffusion.cat_core import weights  # noqa: E402 - after the host's settings
from demo_model import showcase  # noqa: E402
from demo_model.random_checkpoint import random_checkpoint  # noqa: E402

EVERY_TIME = {
    "deadline": None,  # contract.bounded has one
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
# The same draws each time, so that a test which passes once does so again.
hypothesis.settings.register_profile("same", max_examples=300, derandomize=True, **EVERY_TIME)
hypothesis.settings.register_profile("soak", max_examples=30000, print_blob=True, **EVERY_TIME)
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """Lanes (tools/test.py) take whole files, and one of them all tests with a browser."""
    for item in items:
        path = item.path.relative_to(item.config.rootpath)
        group = "browser" if path.parts[0] == "browser" else str(path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_addoption(parser):
    parser.addoption(
        "--dynamic-vram",
        action="store_true",
        help="with the host's dynamic VRAM, as far as a CPU can have it",
    )


@pytest.fixture(scope="session")
def tiny():
    """(parts, architecture) of a tiny random checkpoint in the official layout."""
    with dynamic_vram.ordinary_layers():
        return random_checkpoint("tiny")


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory):
    """The tiny checkpoint as a safetensors file."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    weights.write_cat_weights(path, *tiny, licence="MIT", provenance="random")
    return path


@pytest.fixture(scope="session")
def full_file():
    """A full-size random checkpoint, fp16, kept in the cache (the demo's own)."""
    return showcase.random_weights()
