"""A plain folder of triples - image, mask, label - as records of a manifest."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .manifest import ManifestError, Record

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Found(NamedTuple):
    """One sample of a source: a record, or the reason why there is none."""

    id: str
    record: Record | None = None
    reason: str | None = None
    draw: Callable[[], Image.Image] | None = (
        None  # draws the record's mask where the source has no picture of it
    )


class Folder(NamedTuple):
    """A folder with data, and its path as a manifest writes it."""

    path: Path
    relative: str  # to the manifest's folder, with forward slashes; "" is that folder itself

    def inside(self, name: str) -> str:
        """The manifest's path of a file in this folder."""
        return f"{self.relative}/{name}" if self.relative else name


def sample(id: str, draw: Callable | None = None, **fields) -> Found:
    """A Found for a Record's fields; a caption or label of nothing but spaces is none."""
    for name in ("label", "caption"):
        fields[name] = " ".join(fields.get(name, "").split()) or None
    if fields["label"] is None and (
        fields["caption"] is None or fields.get("mask") or fields.get("box")
    ):
        return Found(id, reason="empty label")
    try:
        return Found(id, Record(id, **fields), draw=draw)
    except ManifestError as error:
        return Found(f"{id}: {error}", reason="malformed sample")


def triples(data: Folder, split: str) -> Iterator[Found]:
    """A folder of triples, each in one of two forms; a sample's id is its image's name without ending.

        fire_hydrant_image.png  fire_hydrant_mask.png                the label is "fire hydrant"
        NAME.jpg                NAME_mask.png          NAME.txt      the label is the text file's content

    A text file named like the image wins in the first form too.
    """
    files = sorted(path.name for path in data.path.iterdir() if path.suffix.lower() in PICTURES)
    stems = {Path(name).stem: name for name in reversed(files)}

    def is_mask(
        stem: str,
    ) -> bool:  # an image may be called gas_mask.jpg; its mask is gas_mask_mask.png
        return stem.endswith("_mask") and f"{stem}_mask" not in stems

    for name in files:
        stem = Path(name).stem
        if is_mask(stem):
            of = stem.removesuffix("_mask")
            if of not in stems and f"{of}_image" not in stems:
                yield Found(stem, reason="missing image")
            continue
        of = stem.removesuffix("_image")
        text = data.path / f"{stem}.txt"
        try:
            label = (
                text.read_text("utf-8-sig") if of == stem or text.exists() else of.replace("_", " ")
            )
        except FileNotFoundError:
            yield Found(stem, reason="missing label")
        except (OSError, UnicodeDecodeError):
            yield Found(stem, reason="unreadable label")
        else:
            mask = stems.get(f"{of}_mask", stems.get(f"{stem}_mask", f"{of}_mask.png"))
            yield sample(
                stem, image=data.inside(name), mask=data.inside(mask), label=label, split=split
            )
