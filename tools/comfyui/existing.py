"""The ComfyUI that a command runs in, among those that are on this machine; nothing is installed.

In this order: the one that --comfyui names, the one that this pack lies in, the one that the Python
belongs to, and the one that demo, tests or --install have put into the cache.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cat_diffusion.cat_core.errors import how_to_install

from . import ROOT, install
from .install import Host, SetupError

RUNS_COMFYUI = ("torch", "safetensors", "aiohttp")  # of what it asks for, to know its Python by
# Where people keep the environment of a ComfyUI; the last one is of its portable version.
BESIDE = (
    ".venv/bin/python",
    "venv/bin/python",
    ".venv/Scripts/python.exe",
    "venv/Scripts/python.exe",
    "../python_embeded/python.exe",
)
# Prints those of the modules it is given that cannot be found. Nothing is imported.
MODULES_QUERY = """
import json, sys
from importlib.util import find_spec
print(json.dumps([name for name in json.loads(sys.argv[1]) if find_spec(name) is None]))
"""
# Prints the version of each package that it is given, null for one that is not there.
PACKAGES_QUERY = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
versions = {}
for name in json.loads(sys.argv[1]):
    try:
        versions[name] = version(name)
    except PackageNotFoundError:
        versions[name] = None
print(json.dumps(versions))
"""


@dataclass(frozen=True)
class Requirement:
    """A line of one of the pack's requirements files."""

    package: str
    least: str  # version
    file: Path

    def __str__(self):
        return f"{self.package}>={self.least}"


def find_host(path: str | None, python: str | None) -> Host | None:
    """The ComfyUI to run in, by the order above; None where there is none.

    Args:
        path: of --comfyui.
        python: of --python; the ComfyUI that it belongs to counts as this Python's.
    Raises:
        SetupError: what was named is not what it should be, or its Python cannot run it.
    """
    if path:
        return existing_host(path, python)
    folder = around_the_pack() or belonging_to(python)
    if folder is not None:
        return existing_host(str(folder), python)
    if python is not None:
        raise SetupError(
            f"{python} belongs to no ComfyUI that could be found. Name its folder with --comfyui."
        )
    return install.prepared_host()


def existing_host(path: str, python: str | None = None) -> Host:
    """The user's own ComfyUI at `path`, with `python` or the environment found beside it.

    Raises SetupError where one of the two is not what it should be.
    """
    root = Path(path).expanduser().absolute()
    if not is_comfyui(root):
        raise SetupError(f"{root} is not a ComfyUI folder: expected main.py and comfy/ in it.")
    its_python = _program(python) if python is not None else _python_of(root)
    missing = missing_modules(its_python, RUNS_COMFYUI)
    if missing:
        raise SetupError(
            f"{its_python} lacks ComfyUI's requirements ({', '.join(missing)}), so it is not the "
            f"Python that runs {root}. Name ComfyUI's own Python with --python."
        )
    return Host(root, its_python)


def is_comfyui(folder: Path) -> bool:
    """Whether a folder holds ComfyUI's sources."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def around_the_pack() -> Path | None:
    """The ComfyUI in whose custom_nodes this pack lies, or a link to it that was started."""
    for pack in (ROOT, _started_from()):
        if pack.parent.name == "custom_nodes" and is_comfyui(pack.parents[1]):
            return pack.parents[1]
    return None


def _started_from() -> Path:
    """The pack's folder as the command line wrote it: a link stays a link."""
    here = os.environ.get("PWD", "")  # of a shell, which knows the link that it went through
    if not os.path.isdir(here) or not os.path.samefile(here, "."):
        here = os.getcwd()
    command = os.path.normpath(os.path.join(here, sys.argv[0]))
    return Path(command).parent.parent


def belonging_to(python: str | None = None) -> Path | None:
    """The ComfyUI whose environment a Python is, this one without a name; None if there is none."""
    folders = []
    if python is None:
        comfy = importlib.util.find_spec("comfy")
        for place in (comfy and comfy.submodule_search_locations) or ():
            folders.append(Path(place).parent)
    program = Path(sys.executable) if python is None else _program(python)
    # python_embeded/python.exe, and .venv/bin/python.
    for environment in (program.parent, program.parent.parent):
        folders += [environment.parent, environment.parent / "ComfyUI"]
    return next(filter(is_comfyui, folders), None)


def _program(name: str) -> Path:
    """The path of a program as it would be run; raises SetupError."""
    path = shutil.which(name)
    if path is None:
        raise SetupError(
            f"{name} is not a program that can be run. Name ComfyUI's own Python with --python."
        )
    return Path(path).absolute()


def _python_of(root: Path) -> Path:
    """This process's where it belongs to that ComfyUI or nothing lies beside it, else that."""
    here = belonging_to()
    if here is None or not here.samefile(root):
        for name in BESIDE:
            if (root / name).is_file():
                return root / name
    return Path(sys.executable)


def missing_modules(python: str | Path, names: Iterable[str]) -> list[str]:
    """Those of some modules that a Python does not have; all where it does not even run."""
    names = list(names)
    found = _ask(python, MODULES_QUERY, names)
    return names if found is None else found


def missing_requirements(python: Path, extras: Iterable[str]) -> list[Requirement]:
    """Of the lines of each `requirements-<extra>.txt` those that a Python does not meet."""
    lines = []
    for extra in extras:
        lines += requirements(ROOT / f"requirements-{extra}.txt")
    if not lines:
        return []
    versions = _ask(python, PACKAGES_QUERY, [line.package for line in lines]) or {}
    missing = []
    for line in lines:
        version = versions.get(line.package)
        if version is None or _numbers(version) < _numbers(line.least):
            missing.append(line)
    return missing


def requirements(file: Path) -> list[Requirement]:
    """The packages that a requirements file names, each with its lowest version."""
    lines = re.findall(r"^([\w.-]+)>=([\w.]+)", file.read_text("utf-8"), re.M)
    return [Requirement(package, least, file) for package, least in lines]


def say_what_is_missing(python: Path, missing: list[Requirement]) -> str:
    """An error for a Python that lacks packages, with the command that installs them."""
    lines = [f"{python} lacks {', '.join(map(str, missing))}. Install with"]
    for file in sorted({line.file.name for line in missing}):
        lines.append(f"    {how_to_install(file, python)}")
    lines.append("or give --install, which runs that.")
    return "\n".join(lines)


def _ask(python: str | Path, code: str, names: list[str]):
    """What a query prints in another Python, or None where that cannot run it."""
    command = [python, "-c", code, json.dumps(names)]
    try:
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """2.10.0rc1+cu128 -> (2, 10, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))
