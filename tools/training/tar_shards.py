"""Tar shards as webdataset knows them: KEY.jpg, KEY.mask.png and KEY.json one after the other.

They are written, and found again; cat_core/data/members.py says how a manifest names what lies in
them. Shards from elsewhere may describe their pictures in KEY.txt, and need no masks.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath

from cat_diffusion.cat_core import files
from cat_diffusion.cat_core.data import members
from cat_diffusion.cat_core.data.folder import PICTURES, Candidate, DataFolder, candidate
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.errors import how_to_install

from .data_sources import SourceError

CUT = "shard cut short"  # a shard's reason
BLOCK = 512  # bytes of a tar file's headers, and what files are filled up to
WORDS = ("label", "caption", "text", "box", "id")  # of KEY.json that are read


# Reading ------------------------------------------------------------------------------------------


def tar_shards(sources: Iterable[str], folder: DataFolder, split: str) -> Iterator[Candidate]:
    """The samples of shards, one after the other.

    Args:
        sources: tar files below the manifest's folder, and what webdataset reads besides: URLs,
            pipe: commands, {000000..000099}. These are copied first.
        folder: the manifest's own for tar files; copies go to its folder `shards`.
    """
    for source in sources:
        for tar in _local(source, folder):
            yield from _samples(tar, folder, split)


def _local(source: str, folder: DataFolder) -> Iterator[Path]:
    """The tar files that a source means, copied where they are elsewhere."""
    if Path(source).is_file():
        yield Path(source)
        return
    try:
        import webdataset
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise SourceError(
            f"{source} is no tar file here. To read it as a URL, pipe: command or pattern takes "
            f"webdataset ({error}). Install it with: {how_to_install('requirements-train.txt')}"
        ) from error
    for number, url in enumerate(expand_urls(source)):
        if Path(url).is_file():
            yield Path(url)
            continue
        name = PurePosixPath(url.split()[-1].split("?")[0]).name.removesuffix(".tar")
        path = folder.path / "shards" / f"{name or 'shard'}-{number:06d}.tar"
        if not path.exists():
            try:
                with files.replacing(path) as partial:
                    _copy(webdataset.gopen(url), partial)
            except (OSError, ValueError) as error:
                raise SourceError(
                    f"{url} cannot be read ({error}), expected a tar file, or a URL or pipe: "
                    "command that gives one."
                ) from error
        yield path


def _copy(stream, path: Path) -> None:
    with stream, open(path, "wb") as copy:
        shutil.copyfileobj(stream, copy)


def _samples(path: Path, folder: DataFolder, split: str) -> Iterator[Candidate]:
    """The samples of a shard; a last Candidate says if it is cut short."""
    relative = folder.inside(path.absolute().relative_to(folder.path.absolute()).as_posix())
    key = None
    parts: dict[str, tarfile.TarInfo] = {}
    size = path.stat().st_size
    is_whole = False
    with open(path, "rb") as content:
        try:
            with tarfile.open(fileobj=content, mode="r:") as tar:
                for info in tar:
                    if not info.isfile():
                        continue
                    folder_of_it, _, name = info.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    if (folder_of_it, stem) != key and parts:
                        yield _sample(relative, content, parts, split)
                        parts = {}
                    key = (folder_of_it, stem)
                    if info.offset_data + info.size <= size:
                        parts[ending.lower()] = info
            is_whole = _ends_well(content, size)
        except tarfile.TarError:
            pass
        # Of a shard that is cut short the last sample may lack what followed.
        if parts and is_whole:
            yield _sample(relative, content, parts, split)
    if not is_whole:
        yield Candidate(path.name, reason=CUT)


def _ends_well(content, size: int) -> bool:
    """Whether a tar file has its end, two blocks of zeros."""
    if size < 2 * BLOCK or size % BLOCK:
        return False
    content.seek(-2 * BLOCK, io.SEEK_END)
    return not any(content.read())


def _sample(tar: str, content, parts: dict[str, tarfile.TarInfo], split: str) -> Candidate:
    image = next((parts[ending[1:]] for ending in PICTURES if ending[1:] in parts), None)
    mask = next((parts[ending] for ending in parts if ending.startswith("mask.")), None)
    first = next(iter(parts.values()))
    id = first.name.partition(".")[0]
    id = f"{PurePosixPath(tar).stem}_{id}"
    if image is None:
        return Candidate(id, reason="no picture")
    try:
        words = _words(content, parts)
        fields = {
            "label": str(words.get("label") or ""),
            "caption": str(words.get("caption") or words.get("text") or ""),
        }
        if words.get("box") is not None:
            fields["box"] = tuple(words["box"])
    except (ValueError, TypeError, RecursionError):
        return Candidate(id, reason="malformed sample")
    return candidate(
        str(words.get("id") or id),
        image=_named(tar, image),
        mask=None if mask is None else _named(tar, mask),
        split=split,
        **fields,
    )


def _words(content, parts: dict[str, tarfile.TarInfo]) -> dict:
    """What is said of a sample; raises ValueError."""
    words = {}
    if "txt" in parts:
        words["caption"] = _text(content, parts["txt"])
    if "json" in parts:
        said = json.loads(_text(content, parts["json"]))
        if not isinstance(said, dict):
            raise ValueError("expected an object")
        words |= {key: said[key] for key in WORDS if said.get(key) is not None}
    return words


def _text(content, info: tarfile.TarInfo) -> str:
    content.seek(info.offset_data)
    return content.read(info.size).decode("utf-8")


def _named(tar: str, info: tarfile.TarInfo) -> str:
    return members.name(tar, PurePosixPath(info.name).name, info.offset_data, info.size)


# Writing ------------------------------------------------------------------------------------------


def packed(records: Iterable[Record], folder: Path, stem: str, most: int) -> Iterator[Record]:
    """Copy the files of records into shards, and yield the records that name them there.

    A picture of several records is in each of their samples, since webdataset's samples are whole.

    Args:
        folder: the manifest's, which the shards STEM-000000.tar go to.
        most: bytes of a shard; a single sample may be larger.
    """
    with ExitStack() as stack:
        tar = None
        shard = -1
        name = ""
        for number, record in enumerate(records):
            if tar is None or tar.offset >= most:
                stack.close()
                shard += 1
                name = f"{stem}-{shard:06d}.tar"
                partial = stack.enter_context(files.replacing(folder / name))
                tar = stack.enter_context(tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT))
            yield _packed(tar, record, folder, name, f"{number:09d}")


def _packed(tar: tarfile.TarFile, record: Record, folder: Path, name: str, key: str) -> Record:
    image = _add(tar, name, f"{key}{_ending(record.image)}", _content(folder / record.image))
    mask = None
    if record.mask is not None:
        content = _content(folder / record.mask)
        mask = _add(tar, name, f"{key}.mask{_ending(record.mask)}", content)
    said = {"id": record.id, "label": record.label, "caption": record.caption, "box": record.box}
    words = {key: value for key, value in said.items() if value is not None}
    _add(tar, name, f"{key}.json", json.dumps(words).encode())
    return replace(record, image=image, mask=mask)


def _add(tar: tarfile.TarFile, name: str, member: str, content: bytes) -> str:
    info = tarfile.TarInfo(member)
    info.size = len(content)
    start = tar.offset + BLOCK  # behind the header
    tar.addfile(info, io.BytesIO(content))
    return members.name(name, member, start, len(content))


def _content(path: Path) -> bytes:
    with members.opened(path) as file:
        return file.read()


def _ending(name: str) -> str:
    return PurePosixPath(name.partition("@")[0]).suffix.lower()
