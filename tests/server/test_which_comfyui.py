"""Which ComfyUI a command runs in, and that it installs nothing unless it is asked to."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from paths import COMFYUI, ROOT

from cat_diffusion.cat_core.evaluation.results import SampleSet
from comfyui import existing, install, launch
from demo_model import scenes

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")

PIP = """
import json, os, sys
with open(os.environ["PIP_CALLS"], "a") as file:
    print(json.dumps([sys.executable, *sys.argv[1:]]), file=file)
sys.exit(int(os.environ["PIP_CODE"]))
"""
FOUND = """
import sys
sys.path.insert(0, sys.argv[1])
from comfyui import existing
host = existing.find_host(*json.loads(sys.argv[2]))
print(json.dumps(host and [str(host.path), str(host.python)]))
"""
FOUND = f"import json\n{FOUND.strip()}"
EXTRAS = ("accelerate", "torchmetrics", "torch_fidelity", "open_clip", "pycocotools", "resvg")
TRAIN = ("train.py", "unet", "--base", "b", "--data", "d", "--run", "r")
IN_COMFYUI = [
    TRAIN,
    ("evaluate.py", "results"),
    ("bench.py",),
    ("parity.py", "--goldens", ROOT / "tests/goldens"),
    ("run.py", "demo_model.recipe", "--work", "w"),
]
IN_ANY_PYTHON = [
    ("convert.py", "a.ckpt", "--full", "b.safetensors"),
    ("prepare_data.py", "folder", "--data", "d", "--out", "m.jsonl"),
    ("generate.py", "w.json", "--manifest", "m", "--out", "o", "--server", "http://127.0.0.1:1"),
]


class Machine:
    """A folder with the pack in it, a cache that is not there yet, and a pip that only notes."""

    def __init__(self, folder):
        self.folder = folder
        self.cache = folder / "cache"
        self.calls = folder / "pip_calls"
        (folder / "b").write_text("weights that the commands ask for")
        (folder / "site/pip").mkdir(parents=True)
        (folder / "site/pip/__main__.py").write_text(PIP)

    def run(self, python, *words, pip_code=0, cwd=None, **changes):
        environment = dict(os.environ)
        environment.pop(launch.COMFYUI, None)
        environment["CAT_DIFFUSION_CACHE"] = str(self.cache)
        environment["PYTHONPATH"] = str(self.folder / "site")
        environment["PIP_CALLS"] = str(self.calls)
        environment["PIP_CODE"] = str(pip_code)
        environment.update(changes)
        run = subprocess.run(
            [python, *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=cwd or self.folder,
        )
        assert "Traceback" not in run.stderr, run.stderr
        return run

    def found(self, python, pack, path=None, named=None):
        """[folder, Python] that a command of `pack` would run in, or None."""
        run = self.run(python, "-c", FOUND, pack / "tools", json.dumps([path, named]))
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    def pip_calls(self):
        """Arguments of each, from the Python that it ran in on."""
        if not self.calls.exists():
            return []
        return [json.loads(line) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def copy_pack(folder):
    """The parts of the pack that a command needs."""
    leave = shutil.ignore_patterns("__pycache__")
    for part in ("tools", "cat_core", "nodes"):
        shutil.copytree(ROOT / part, folder / part, ignore=leave)
    for file in ROOT.glob("requirements-*.txt"):
        shutil.copy(file, folder)
    (folder / "models").symlink_to(ROOT / "models")
    return folder


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """A checkout that lies in no ComfyUI."""
    return copy_pack(tmp_path_factory.mktemp("checkout") / "cat-diffusion")


def environment(folder, *, packages):
    """A Python without pip: bare, or with what the tests' has but for the pack's own extras."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    if packages:
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.lower().startswith((*EXTRAS, "pip")):
                (site / entry.name).symlink_to(entry)
    return python


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """A Python with nothing in it."""
    return environment(tmp_path_factory.mktemp("bare") / "env", packages=False)


@pytest.fixture(scope="session")
def own_comfyui(tmp_path_factory):
    """A user's ComfyUI with an environment in it, and the pack among its nodes."""
    folder = tmp_path_factory.mktemp("user") / "ComfyUI"
    folder.mkdir()
    for entry in COMFYUI.iterdir():
        if entry.name not in ("custom_nodes", "__pycache__"):
            (folder / entry.name).symlink_to(entry)
    environment(folder / ".venv", packages=True)
    copy_pack(folder / "custom_nodes/cat-diffusion")
    return folder


@pytest.mark.parametrize("words", IN_COMFYUI + IN_ANY_PYTHON, ids=lambda words: words[0])
def test_a_command_without_comfyui_says_what_it_needs_and_installs_nothing(
    machine, pack, bare_python, words
):
    run = machine.run(bare_python, pack / "tools" / words[0], *words[1:])
    assert run.returncode == 2
    if words in IN_COMFYUI:
        assert "no ComfyUI was found" in run.stderr
        assert "--install" in run.stderr
    else:
        assert f'"{bare_python}" -m pip install ' in run.stderr
    assert "--comfyui" in run.stderr
    assert machine.pip_calls() == []
    assert not machine.cache.exists()


@pytest.mark.parametrize("words", [TRAIN, ("bench.py",)], ids=lambda words: words[0])
def test_a_missing_package_is_named_with_the_command_that_installs_it(machine, own_comfyui, words):
    pack = own_comfyui / "custom_nodes/cat-diffusion"
    python = own_comfyui / ".venv/bin/python"
    run = machine.run(python, pack / "tools" / words[0], *words[1:])
    assert run.returncode == 2
    assert f"{python} lacks accelerate>=1.0." in run.stderr
    assert f'"{python}" -m pip install -r "{pack / "requirements-train.txt"}"' in run.stderr
    assert machine.pip_calls() == []
    assert not machine.cache.exists()


def test_install_installs_just_that(machine, own_comfyui):
    pack = own_comfyui / "custom_nodes/cat-diffusion"
    python = own_comfyui / ".venv/bin/python"
    run = machine.run(sys.executable, pack / "tools/train.py", *TRAIN[1:], "--install")
    (call,) = machine.pip_calls()
    assert call[0] == str(python)
    assert call[-3:] == ["-q", "-r", str(pack / "requirements-train.txt")]
    assert f"Installing requirements-train.txt for {python} ..." in run.stdout
    assert f"ComfyUI: {own_comfyui}, with {python}" in run.stderr
    assert not machine.cache.exists()


def test_install_brings_a_comfyui_where_there_is_none(machine, pack, bare_python):
    run = machine.run(bare_python, pack / "tools/evaluate.py", "results", "--install", pip_code=1)
    assert run.returncode == 2
    assert "Fetching ComfyUI" in run.stdout
    assert "pip download failed" in run.stderr
    assert machine.pip_calls()[0][2] == "download"


def test_a_failed_install_ends_the_command(machine, own_comfyui):
    command = own_comfyui / "custom_nodes/cat-diffusion/tools/train.py"
    run = machine.run(sys.executable, command, *TRAIN[1:], "--install", pip_code=1)
    assert run.returncode == 2
    assert "pip install failed" in run.stderr


# The order ----------------------------------------------------------------------------------------


def test_a_named_comfyui_comes_first(machine, own_comfyui):
    pack = own_comfyui / "custom_nodes/cat-diffusion"
    found = machine.found(sys.executable, pack, str(COMFYUI), sys.executable)
    assert found == [str(COMFYUI), sys.executable]


def test_the_comfyui_around_the_pack_comes_before_that_of_the_python(machine, own_comfyui):
    pack = own_comfyui / "custom_nodes/cat-diffusion"
    its_python = str(own_comfyui / ".venv/bin/python")
    assert machine.found(sys.executable, pack) == [str(own_comfyui), its_python]
    named = machine.found(sys.executable, pack, None, sys.executable)
    assert named == [str(own_comfyui), sys.executable]


def test_a_linked_pack_lies_where_its_link_lies(machine, own_comfyui, pack):
    link = own_comfyui / "custom_nodes/linked"
    link.symlink_to(pack)
    words = ("tools/run.py", "demo_model.scenes", "--help")
    try:
        inside = machine.run(sys.executable, *words, cwd=link, PWD=str(link))
        outside = machine.run(sys.executable, link / words[0], *words[1:])
    finally:
        link.unlink()
    for run in (inside, outside):
        assert f"ComfyUI: {own_comfyui}, with {own_comfyui / '.venv/bin/python'}" in run.stderr
        assert "demo_model.scenes [-h]" in run.stdout


def test_the_python_comes_before_the_cache(machine, own_comfyui, pack, bare_python):
    its_python = own_comfyui / ".venv/bin/python"
    machine.cache.mkdir()
    (machine.cache / "ComfyUI-0.30.0").mkdir()
    (machine.cache / "ComfyUI-0.30.0/ComfyUI").symlink_to(COMFYUI)
    assert machine.found(its_python, pack) == [str(own_comfyui), str(its_python)]
    assert machine.found(sys.executable, pack, None, str(its_python))[0] == str(own_comfyui)
    # A cache that holds half of it holds nothing.
    assert machine.found(bare_python, pack) is None


def test_the_cache_is_used_where_it_is_there_already(machine, pack, bare_python):
    machine.cache.mkdir()
    real = install.prepared_host()
    if real is None:
        pytest.skip("the tests do not run in the cache")
    (machine.cache / real.path.parent.name).symlink_to(real.path.parent)
    its_environment = real.python.parents[1]
    (machine.cache / its_environment.name).symlink_to(its_environment)
    path, python = machine.found(bare_python, pack)
    assert path == str(machine.cache / real.path.parent.name / "ComfyUI")
    assert python == str(machine.cache / its_environment.name / "bin/python")
    assert machine.pip_calls() == []


def test_a_python_that_cannot_run_comfyui_is_refused(machine, own_comfyui, pack, bare_python):
    inside = own_comfyui / "custom_nodes/cat-diffusion"
    its_python = ("--python", bare_python)
    named = machine.run(
        bare_python, pack / "tools/train.py", *TRAIN[1:], "--comfyui", own_comfyui, *its_python
    )
    around = machine.run(bare_python, inside / "tools/train.py", *TRAIN[1:], *its_python)
    for run in (named, around):
        assert run.returncode == 2
        assert f"{bare_python} lacks ComfyUI's requirements (torch, safetensors" in run.stderr
    nowhere = machine.run(bare_python, pack / "tools/train.py", *TRAIN[1:], *its_python)
    assert nowhere.returncode == 2
    assert f"{bare_python} belongs to no ComfyUI that could be found" in nowhere.stderr


def test_portable_windows_is_known_by_its_folders(tmp_path):
    for name in ("ComfyUI/comfy", "python_embeded"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ComfyUI/main.py").touch()
    python = tmp_path / "python_embeded/python.exe"
    python.touch(mode=0o755)
    assert existing.belonging_to(str(python)) == tmp_path / "ComfyUI"


# Where libraries are missing ----------------------------------------------------------------------


def test_the_evaluation_runs_without_its_libraries(machine, own_comfyui):
    """From ComfyUI's own Python, which has neither torchmetrics nor open_clip."""
    manifest = scenes.write(machine.folder / "scenes", scenes.TEST[:3], 64)
    results = machine.folder / "results"
    results.mkdir()
    samples = SampleSet(manifest, "test", "box", 64).read()
    for sample in map(samples.sample, samples.records):
        sample.picture.save(results / f"{sample.record.id}.png")
    told = {"manifest": str(manifest), "split": "test", "hole": "box", "size": 64}
    (results / "run.json").write_text(json.dumps(told))
    command = own_comfyui / "custom_nodes/cat-diffusion/tools/evaluate.py"
    python = own_comfyui / ".venv/bin/python"
    words = ("--clip-score", "ViT-L-14-quickgelu:openai", "--cpu", "--threads", "1")
    run = machine.run(python, command, results, *words)
    assert run.returncode == 0, run.stderr
    assert "FID needs torchmetrics" in run.stdout
    assert "CLIP score is left out: open_clip is not installed" in run.stdout
    assert f'"{python}" -m pip install -r ' in run.stdout
    assert "Background error, mean" in run.stdout
    assert machine.pip_calls() == []
    assert not machine.cache.exists()
