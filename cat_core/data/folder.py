"""A plain folder of triples - image, mask, label - as records of a manifest."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .manifest import ManifestError, Record

PNG_AND_JPEG = (".png", ".jpg", ".jpeg", ".jfif")
PICTURES = (*PNG_AND_JPEG, ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2")


class Candidate(NamedTuple):
    """One sample of a data set: its record for the manifest, or the reason why there is none."""

    id: str
    record: Record | None = None
    reason: str | None = None
    draw: Callable[[], Image.Image] | None = None  # the mask, where the data set has no picture


class DataFolder(NamedTuple):
    """A folder with data, and its path as a manifest writes it."""

    path: Path
    relative: str  # to the manifest's folder, with forward slashes; "" is that folder itself

    def inside(self, name: str) -> str:
        """The manifest's path of a file in this folder."""
        return f"{self.relative}/{name}" if self.relative else name


def candidate(id: str, draw: Callable[[], Image.Image] | None = None, **fields) -> Candidate:
    """A Candidate for a Record's fields.

    A caption or label of nothing but spaces is none.
    """
    for name in ("label", "caption"):
        fields[name] = " ".join(fields.get(name, "").split()) or None
    has_object = fields.get("mask") or fields.get("box")
    if fields["label"] is None and (fields["caption"] is None or has_object):
        return Candidate(id, reason="empty label")
    try:
        return Candidate(id, Record(id, **fields), draw=draw)
    except ManifestError as error:
        return Candidate(f"{id}: {error}", reason="malformed sample")


def triples(data: DataFolder, split: str) -> Iterator[Candidate]:
    """A folder of triples, each in one of two forms.

        fire_hydrant_image.png  fire_hydrant_mask.png           the label is "fire hydrant"
        NAME.jpg                NAME_mask.png      NAME.txt     the label is the text file's content

    A text file named like the image wins in the first form too. A sample's id is its image's name
    without ending; where several have the same, the ending that PICTURES names first counts.
    """
    files = sorted(path.name for path in data.path.iterdir())
    stems = {}
    for name in sorted(filter(_is_picture, files), key=_rank):
        stems.setdefault(Path(name).stem, name)
    unread = set(_unread(files, stems))
    images = {*stems, *(Path(name).stem for name in unread)}
    for name in files:
        stem = Path(name).stem
        if name in unread:
            yield Candidate(name, reason=f"{_ending(name)} is no format that is read")
        elif not _is_picture(name):
            continue
        elif stems[stem] != name:
            yield Candidate(name, reason="same name with another ending")
        elif not _is_mask(stem, stems):
            yield _triple(data, name, stems, split)
        elif _lacks_image(stem, images):
            yield Candidate(stem, reason="missing image")


def _is_picture(name: str) -> bool:
    return _ending(name) in PICTURES


def _ending(name: str) -> str:
    return Path(name).suffix.lower()


def _rank(name: str) -> tuple[int, str]:
    return PICTURES.index(_ending(name)), name


def _unread(files: list[str], stems: dict[str, str]) -> Iterator[str]:
    """Files that are meant as images, since they have a mask or a label, in other formats."""
    names = set(files)
    for name in files:
        stem = Path(name).stem
        is_other = _ending(name) not in ("", ".txt", *PICTURES) and stem not in stems
        has_label = f"{stem}.txt" in names
        has_mask = f"{stem.removesuffix('_image')}_mask" in stems
        if is_other and (has_label or has_mask):
            yield name


def _triple(data: DataFolder, name: str, stems: dict[str, str], split: str) -> Candidate:
    """The sample of an image; `stems` are the folder's pictures by their names without ending."""
    stem = Path(name).stem
    subject = stem.removesuffix("_image")
    text = data.path / f"{stem}.txt"
    try:
        if subject == stem or text.exists():
            label = text.read_text("utf-8-sig")
        else:
            label = subject.replace("_", " ")
    except FileNotFoundError:
        return Candidate(stem, reason="missing label")
    except (OSError, UnicodeDecodeError):
        return Candidate(stem, reason="unreadable label")
    mask = stems.get(f"{subject}_mask") or stems.get(f"{stem}_mask") or f"{subject}_mask.png"
    return candidate(
        stem, image=data.inside(name), mask=data.inside(mask), label=label, split=split
    )


def _is_mask(stem: str, stems: dict[str, str]) -> bool:
    """An image may be called gas_mask.jpg; its mask is gas_mask_mask.png."""
    return stem.endswith("_mask") and f"{stem}_mask" not in stems


def _lacks_image(mask: str, images: set[str]) -> bool:
    subject = mask.removesuffix("_mask")
    return subject not in images and f"{subject}_image" not in images
