"""From a test set to the table: workflows on a server, a pipeline of diffusers, evaluation."""

import json
import subprocess
import sys

import pytest
from conftest import SIZE
from diffusers import StableDiffusionInpaintPipeline
from paths import ROOT
from tiny_pipeline import tiny_parts

from comfyui.local_server import LocalServer, make_base
from demo_model import scenes

NAMES = ["plain", "cat", "tiny"]
DEMO = "cat_demo_model.safetensors"


def workflow_of(baseline, folder):
    """A baseline with the demo model and a few steps."""
    nodes = json.loads((ROOT / f"workflows/baselines/{baseline}.json").read_text("utf-8"))
    nodes["1"] = {**nodes["1"], "class_type": "CATLoadCheckpoint", "inputs": {"checkpoint": DEMO}}
    for node in nodes.values():
        if node["class_type"] == "CATScheduler":
            node["inputs"]["steps"] = 10
    path = folder / f"{baseline}.json"
    path.write_text(json.dumps(nodes))
    return path


def run(tool, *words):
    command = [sys.executable, ROOT / "tools" / tool, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_one_table_of_plain_inpainting_cat_and_a_pipeline(tmp_path, monkeypatch):
    """On drawn scenes: the demo model without and with its visual prompt, and random networks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manifest = scenes.write(tmp_path / "scenes", scenes.TEST[:6], SIZE)
    common = ["--manifest", manifest, "--size", SIZE, "--hole", "box"]
    results = [tmp_path / "results" / name for name in NAMES]
    (tmp_path / "base").mkdir()
    make_base(tmp_path / "base")
    with LocalServer(tmp_path / "base", "--cpu") as server:
        for baseline, out in (("sd_inpainting", results[0]), ("cat", results[1])):
            workflow = workflow_of(baseline, tmp_path)
            run("generate.py", workflow, *common, "--out", out, "--server", server.url)
    parts = tiny_parts(9, SIZE)
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "tiny")
    method = ["--method", f"diffusers:{tmp_path / 'tiny'}", "--steps", 3, "--cpu"]
    run("generate.py", *method, *common, "--out", results[2])

    written = ["--markdown", tmp_path / "table.md", "--json", tmp_path / "m.json"]
    run("evaluate.py", *results, *written, "--cpu")
    table = (tmp_path / "table.md").read_text("utf-8")
    print(table)
    assert f"| | {' | '.join(NAMES)} |" in table
    values = {}
    for line in json.loads((tmp_path / "m.json").read_text())["lines"]:
        values[line["metric"], line["name"]] = line["estimate"]["value"]
    for name in NAMES:
        assert values["background_max", name] == 0  # all put the photo back
        assert values["fid", name] > 0
    # The demo model's U-Net was trained with a visual prompt; random networks paint no object.
    for name in ("plain", "tiny"):
        assert values["object_similarity", "cat"] > values["object_similarity", name] + 0.1
        assert values["local_fid", "cat"] < values["local_fid", name]
