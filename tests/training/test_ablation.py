"""The ablation as one command, shortened until nothing is learned: files, layout, and that a second run does nothing again."""

import json
import os
import subprocess
import sys

from paths import ROOT
from PIL import Image


def test_one_command_from_scenes_to_table(tmp_path):
    command = [
        sys.executable,
        ROOT / "tools/run.py",
        "demo_model.ablation",
        "--work",
        tmp_path,
        "--shorter",
        "250",
        "--cpu",
        "--threads",
        "1",
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "measured.json").read_text())
    table = (tmp_path / "table.md").read_text()
    for hole in ("box", "segment"):
        rows = found[hole]["rows"]
        assert {"fid", "local_fid", "clip_score", "named", "diversity_pixels"} <= rows.keys()
        assert all(len(cells) == 3 for cells in rows.values())
        assert (
            rows["background_mean"][0]["mean"] == 0
            and "difference" in rows["fid"][1]
            and "difference" not in rows["fid"][0]
        )
        assert rows["diversity_pixels"][0]["mean"] > 0  # other seeds, other pictures
        assert set(found[hole]["feature_cosines"]) == {
            "observed, row3.safetensors",
            "predicted, row3.safetensors",
        }
        assert (tmp_path / f"report/{hole}/index.html").is_file()
        assert (
            Image.open(tmp_path / f"seeds-{hole}.png").width == 11 * 128
            and (tmp_path / f"histogram-{hole}.png").is_file()
        )
        for row in (1, 2, 3):
            for seed in (0, 1, 2):
                assert (
                    len(list((tmp_path / f"results/row{row}-{hole}-seed{seed}").glob("*.png"))) == 2
                )
    assert "| 2 holes, boxes | 1. inpainting | 2. + RefAdapter | 3. + SemInpainter |" in table

    picture = tmp_path / "results/row3-box-seed2"
    stamps = {path: path.stat().st_mtime_ns for path in picture.iterdir()}
    again = subprocess.run(
        [*command, "--only", "sample"], capture_output=True, text=True, env=os.environ
    )
    assert again.returncode == 0 and stamps == {
        path: path.stat().st_mtime_ns for path in picture.iterdir()
    }
