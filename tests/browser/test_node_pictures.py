"""The tool that draws the pictures of the help pages, for one small node."""

import os
import subprocess
import sys

import pytest
from paths import COMFYUI, ROOT
from PIL import Image

from comfyui import install

NODE = "CATScheduler"


def test_the_picture_of_a_node(chromium, tmp_path):
    pytest.importorskip("playwright")
    if f'"{install.NEWEST}"' not in (COMFYUI / "comfyui_version.py").read_text():
        pytest.skip(f"the tool knows the pages of ComfyUI {install.NEWEST} only")
    command = [sys.executable, ROOT / "tools/run.py", "release.node_pictures"]
    # Threads that wait for each other starve beside Chromium.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--node", NODE, "--out", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    shown = ROOT / "web/docs"
    for name in (f"{NODE}.png", f"{NODE}/zh.png"):
        with Image.open(tmp_path / name) as made, Image.open(shown / name) as shipped:
            assert made.width == shipped.width
            assert made.height == pytest.approx(shipped.height, rel=0.1)  # fonts differ
            assert len(made.convert("RGB").getcolors(2**16)) > 32
