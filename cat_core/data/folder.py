"""A plain folder of triples - image, mask, label - as records of a manifest."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .manifest import ManifestError, Record

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
    without ending.
    """
    files = sorted(path.name for path in data.path.iterdir() if path.suffix.lower() in PICTURES)
    # Where a stem has several endings, the first one counts.
    stems = {Path(name).stem: name for name in reversed(files)}
    for name in files:
        stem = Path(name).stem
        if not _is_mask(stem, stems):
            yield _triple(data, name, stems, split)
        elif _lacks_image(stem, stems):
            yield Candidate(stem, reason="missing image")


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


def _lacks_image(mask: str, stems: dict[str, str]) -> bool:
    subject = mask.removesuffix("_mask")
    return subject not in stems and f"{subject}_image" not in stems
