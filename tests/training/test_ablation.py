"""The ablation as one command, shortened until nothing is learned.

Files, layout, and that a second run does nothing again.
"""

import json
import subprocess
import sys

import pytest
from paths import ROOT
from PIL import Image

METRICS = {"fid", "local_fid", "clip_score", "named", "diversity_pixels"}
COSINES = {"observed, row3.safetensors", "predicted, row3.safetensors"}


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.full
def test_one_command_from_scenes_to_table(tmp_path):
    command = [sys.executable, ROOT / "tools/run.py", "demo_model.ablation", "--work", tmp_path]
    command += ["--shorter", "250", "--cpu", "--threads", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "measured.json").read_text())
    for hole in ("box", "segment"):
        check_numbers(found[hole])
        check_files(tmp_path, hole)
    table = (tmp_path / "table.md").read_text()
    assert "| 2 holes, boxes | 1. inpainting | 2. + RefAdapter | 3. + SemInpainter |" in table

    results = tmp_path / "results/row3-box-seed2"
    before = stamps(results)
    again = subprocess.run([*command, "--only", "sample"], capture_output=True, text=True)
    assert again.returncode == 0
    assert stamps(results) == before


def check_numbers(found):
    rows = found["rows"]
    assert rows.keys() >= METRICS
    for cells in rows.values():
        assert len(cells) == 3
    assert rows["background_mean"][0]["mean"] == 0
    assert "difference" in rows["fid"][1]
    assert "difference" not in rows["fid"][0]
    assert rows["diversity_pixels"][0]["mean"] > 0  # other seeds, other pictures
    assert set(found["feature_cosines"]) == COSINES


def check_files(folder, hole):
    assert (folder / f"report/{hole}/index.html").is_file()
    assert (folder / f"histogram-{hole}.png").is_file()
    assert Image.open(folder / f"seeds-{hole}.png").width == 11 * 128
    for row in (1, 2, 3):
        for seed in (0, 1, 2):
            results = folder / f"results/row{row}-{hole}-seed{seed}"
            assert len(list(results.glob("*.png"))) == 2
