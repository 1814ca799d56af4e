"""What others run over packs before they list them: `tools/test.py --release` installs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import COMFYUI, ROOT

from comfyui.local_server import make_base

FOLDER = os.environ.get("CAT_DIFFUSION_CHECKS")
pytestmark = pytest.mark.skipif(not FOLDER, reason="runs with tools/test.py --release")


# What names a file or folder that a user brings, which no server of a test has.
BROUGHT = {
    *("ckpt_name", "clip_name", "weights", "checkpoint", "lora_name", "control_net_name"),
    *("image", "folder"),
}


def check(program, *arguments):
    """What one of the programs prints."""
    command = [sys.executable, Path(FOLDER, "bin", program), *arguments]
    environment = {**os.environ, "PYTHONPATH": FOLDER}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout, run.stderr
    return run.stdout


def test_the_host_has_every_symbol_that_the_pack_names(tmp_path):
    """comfy-import-guard reads a host out of a git repository, the pack out of an installation."""
    shutil.copytree(COMFYUI, tmp_path / "ComfyUI", ignore=shutil.ignore_patterns(".git"))
    for command in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-qm", "host"]):
        names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *names, *command], cwd=tmp_path / "ComfyUI", check=True)
    make_base(tmp_path / "installation")
    said = check(
        *("comfy-import-guard", "--offline", "--cache-dir", tmp_path, "check", "--no-update"),
        *("--strict", "--target", "HEAD", "--comfy-dir", tmp_path / "installation"),
    )
    assert "1 safe" in said, said


def test_example_workflows_are_without_lint(server):
    files = sorted((ROOT / "workflows/api").glob("*.json"))
    report = json.loads(check("comfy-lint", "--json", "--strict", "--server", server.url, *files))
    assert len(report["files"]) == len(files)
    found = []
    for file in report["files"]:
        for one in file["diagnostics"]:
            if one["rule"] != "invalid-enum" or one["field"] not in BROUGHT:
                found.append(one)
    assert found == []
