"""tools/parity.py passes on the goldens, and can fail."""

import os
import shutil
import subprocess
import sys

from paths import GOLDENS, ROOT
from safetensors.torch import load_file, save_file


def parity(folder):
    return subprocess.run(
        [sys.executable, ROOT / "tools/parity.py", "--goldens", folder],
        capture_output=True,
        text=True,
        env=os.environ,
    )


def test_every_golden_case_is_within_its_bound():
    run = parity(GOLDENS)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("ok")]
    assert len(lines) == 3 * 10 + 2 * 4 * 2 + 5 + 10
    assert "FAIL" not in run.stdout


def test_a_wrong_golden_fails(tmp_path):
    shutil.copytree(GOLDENS, tmp_path / "goldens")
    path = tmp_path / "goldens/unet_cases.safetensors"
    tensors = load_file(path)
    tensors["cond.out.eps"] = tensors["cond.out.eps"].clone()
    tensors["cond.out.eps"][0, 0, 0, 0] += 1e-3 * tensors["cond.out.eps"].abs().max()
    save_file(tensors, path)
    index = tmp_path / "goldens/index.json"
    index.write_text(index.read_text().replace("93f1eca9", "00000000"))
    run = parity(tmp_path / "goldens")
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAIL")]
    assert run.returncode == 1 and len(failed) == 2
    assert "U-Net with RefAdapter cond " in run.stdout and "image_512_u8 sha256" in failed[0]


def test_a_folder_without_goldens_is_refused(tmp_path):
    run = parity(tmp_path)
    assert run.returncode == 2 and "no index.json" in run.stderr
