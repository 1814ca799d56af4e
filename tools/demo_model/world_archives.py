"""The packages that the demo model's world is made from: fetched by name, checked, and read.

Each comes through the client of its registry, and only with the SHA-256 that is written here.
Nothing is unpacked: the files that are asked for are read out of the archive.
"""

import hashlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_NODE = "Install Node.js, which brings npm"
_DEBIAN = "Run this on Debian 12"
# The wheels that are named here are of one platform; only pictures are read from them.
_ANY_WHEEL = ("--only-binary", ":all:", "--python-version", "3.11")
_ANY_WHEEL += ("--platform", "manylinux_2_28_x86_64")
_BLOCK = 1 << 20  # bytes that are read at once
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # bytes before each member of a .deb: its name, ..., its size, two more


class ArchiveError(RuntimeError):
    """A package that cannot be had, or is another than expected; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """A package of one version.

    Attributes:
        registry: "npm", "PyPI" or "Debian".
        file: the name that its archive has here.
        sha256: of the archive.
    """

    registry: str
    name: str
    version: str
    file: str
    sha256: str


ARCHIVES = (
    Archive(
        registry="npm",
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    Archive(
        registry="npm",
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        file="iconify-json-fluent-emoji-flat-1.2.6.tgz",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    Archive(
        registry="npm",
        name="@iconify-json/noto",
        version="1.2.9",
        file="iconify-json-noto-1.2.9.tgz",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    Archive(
        registry="Debian",
        name="gcompris-qt-data",
        version="3.1-2",
        file="gcompris-qt-data_3.1-2_all.deb",
        sha256="e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
    ),
    Archive(
        registry="Debian",
        name="lomiri-wallpapers-16.04",
        version="20.04.0-2",
        file="lomiri-wallpapers-16.04_20.04.0-2_all.deb",
        sha256="a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    ),
    Archive(
        registry="Debian",
        name="lomiri-wallpapers-20.04",
        version="20.04.0-2",
        file="lomiri-wallpapers-20.04_20.04.0-2_all.deb",
        sha256="d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
    ),
    Archive(
        registry="Debian",
        name="palapeli-data",
        version="4:22.12.3-1",
        file="palapeli-data_4%3a22.12.3-1_all.deb",
        sha256="69a15dce2ac25ed8708ac518cd0cee5f4eb0c70ed15da2fdb8899a19ac0ee058",
    ),
    Archive(
        registry="PyPI",
        name="scikit-image",
        version="0.26.0",
        file="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ),
    Archive(
        registry="PyPI",
        name="scikit-learn",
        version="1.9.1",
        file="scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    ),
)


def archive_of(package: str) -> Archive:
    """The archive of a package by its name; raises KeyError for one that is not listed."""
    for archive in ARCHIVES:
        if archive.name == package:
            return archive
    raise KeyError(package)


# Fetching -----------------------------------------------------------------------------------------


def fetch_archive(archive: Archive, folder: Path) -> Path:
    """The path of an archive in a folder, downloaded unless it lies there already.

    Raises ArchiveError where the registry's client is missing or fails, or where the file has
    another hash than expected.
    """
    path = folder / archive.file
    if not path.is_file():
        print(f"Fetching {archive.name} {archive.version} ...", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".partial", dir=folder) as download:
            _download(archive, Path(download))
            _take(Path(download), path)
    _check(archive, path)
    return path


def _download(archive: Archive, folder: Path) -> None:
    """Have the registry's client put one file into an empty folder."""
    if archive.registry == "npm":
        command = ["npm", "pack", "--silent", f"{archive.name}@{archive.version}"]
        remedy = _NODE
    elif archive.registry == "PyPI":
        package = f"{archive.name}=={archive.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *_ANY_WHEEL, package]
        remedy = "Install pip"
    else:
        command = ["apt-get", "download", f"{archive.name}={archive.version}"]
        remedy = _DEBIAN
    by_hand = f"or put {archive.file} into {folder.parent} yourself"
    if shutil.which(command[0]) is None:
        raise ArchiveError(
            f"{archive.name} comes from {archive.registry}, and {command[0]} is not installed. "
            f"{remedy}, {by_hand}."
        )
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        raise ArchiveError(
            f"{' '.join(command)} failed: {_last_line(run.stderr)} Check the network, and that "
            f"the list of packages is new (apt-get update). {remedy}, {by_hand}."
        )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing."


def _take(folder: Path, path: Path) -> None:
    """Move the one file of a folder to a path."""
    files = list(folder.iterdir())
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "nothing"
        raise ArchiveError(f"A download left {names}, expected the one file {path.name}.")
    files[0].replace(path)


def _check(archive: Archive, path: Path) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != archive.sha256:
        raise ArchiveError(
            f"{path} has sha256 {digest.hexdigest()}, expected {archive.sha256}. Delete it and "
            f"run again; if that does not help, {archive.registry} serves another file."
        )


# Reading ------------------------------------------------------------------------------------------


def read_files(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Files of an archive by their paths in it, as an npm, PyPI or Debian package has them.

    Raises ArchiveError for a path that is not in it.
    """
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            contents = {name: wheel.read(name) for name in names if name in wheel.NameToInfo}
    elif path.suffix == ".deb":
        contents = _tar_files(_debian_data(path), names)
    else:
        contents = _tar_files(io.BytesIO(path.read_bytes()), names)
    for name in names:
        if name not in contents:
            raise ArchiveError(f"{path} has no {name}, expected the package that lists it.")
    return contents


def _tar_files(file: io.BytesIO, names: Collection[str]) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if name in names and member.isfile():
                contents[name] = tar.extractfile(member).read()
    return contents


def _debian_data(path: Path) -> io.BytesIO:
    """The tar with a .deb's files: deb(5), an ar archive whose member data.tar.xz it is."""
    blob = path.read_bytes()
    if not blob.startswith(_AR_MAGIC):
        raise ArchiveError(f"{path} is no Debian package: it does not begin with {_AR_MAGIC!r}.")
    start = len(_AR_MAGIC)
    while start + _AR_HEADER <= len(blob):
        name = blob[start : start + 16].decode().strip().rstrip("/")
        size = int(blob[start + 48 : start + 58])
        begin = start + _AR_HEADER
        if name == "data.tar.xz":
            return io.BytesIO(lzma.decompress(blob[begin : begin + size]))
        start = begin + size + size % 2  # members begin at even places
    raise ArchiveError(f"{path} has no data.tar.xz, expected a package of Debian 12.")
