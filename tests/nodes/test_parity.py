"""tools/parity.py passes on the goldens, and can fail."""

import os
import shutil
import subprocess
import sys

import pytest
from paths import GOLDENS, ROOT
from safetensors.torch import load_file, save_file

EXPECTED_CASES = {
    "preprocessing": 3 * 10,  # pictures, arrays
    "SemInpainter": 2 * 4 * 2,  # cases, outputs, core and host
    "U-Net": 5,
    "trajectory": 10,
}


def parity(folder):
    command = [sys.executable, ROOT / "tools/parity.py", "--goldens", folder]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


def lines_with(run, verdict):
    return [line for line in run.stdout.splitlines() if line.startswith(verdict)]


@pytest.mark.slow
def test_every_golden_case_is_within_its_bound():
    run = parity(GOLDENS)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    good = lines_with(run, "ok")
    for kind, count in EXPECTED_CASES.items():
        assert len([line for line in good if line.startswith(f"ok   {kind}")]) == count
    assert len(good) == sum(EXPECTED_CASES.values())
    assert lines_with(run, "FAIL") == []


@pytest.mark.once
@pytest.mark.slow
def test_a_wrong_golden_fails(tmp_path):
    folder = tmp_path / "goldens"
    shutil.copytree(GOLDENS, folder)
    path = folder / "unet_cases.safetensors"
    tensors = load_file(path)
    eps = tensors["cond.out.eps"].clone()
    eps[0, 0, 0, 0] += 1e-3 * eps.abs().max()
    save_file(tensors | {"cond.out.eps": eps}, path)
    index = folder / "index.json"
    index.write_text(index.read_text().replace("93f1eca9", "00000000"))
    run = parity(folder)
    assert run.returncode == 1
    preprocessing, unet = lines_with(run, "FAIL")
    assert "image_512_u8 sha256" in preprocessing
    assert "U-Net with RefAdapter cond " in unet


def test_a_folder_without_goldens_is_refused(tmp_path):
    run = parity(tmp_path)
    assert run.returncode == 2
    assert "no index.json" in run.stderr
