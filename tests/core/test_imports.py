"""The core stands alone, and importing anything leaves the world as it was."""

import subprocess
import sys

from paths import ROOT

CODE = """
import pkgutil, sys
import cat_core
for module in pkgutil.walk_packages(cat_core.__path__, "cat_core."):
    __import__(module.name)
foreign = {"comfy", "nodes", "folder_paths", "comfy_api"}
optional = {"torchmetrics", "torch_fidelity", "open_clip", "accelerate", "pycocotools"}
print(sorted({name.split(".")[0] for name in sys.modules} & (foreign | optional)))
print(sum(name.startswith("cat_core") for name in sys.modules))
"""


def test_core_imports_no_comfyui_and_nothing_optional():
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    leaked, modules = run.stdout.split("\n")[:2]
    assert leaked == "[]"
    assert int(modules) == sum(1 for _ in (ROOT / "cat_core").rglob("*.py"))


def test_runtime_requirements_name_nothing_that_the_host_has():
    lines = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            lines.append(line)
    assert lines == []
