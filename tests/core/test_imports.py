"""The core stands alone, and importing anything leaves the world as it was."""

import subprocess
import sys

from paths import ROOT


def test_core_imports_no_comfyui_and_nothing_optional():
    code = """
import pkgutil, sys, cat_core
for module in pkgutil.walk_packages(cat_core.__path__, "cat_core."):
    __import__(module.name)
print([name for name in sys.modules if name.split(".")[0] in ("comfy", "nodes", "folder_paths", "comfy_api", "torchmetrics",
                                                                      "torch_fidelity", "open_clip")])
print(sum(name.startswith("cat_core") for name in sys.modules))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    leaked, modules = run.stdout.split("\n")[:2]
    assert leaked == "[]"
    assert int(modules) >= 8


def test_runtime_requirements_name_nothing_that_the_host_has():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines == []
