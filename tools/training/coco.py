"""COCO's annotations as candidates for a manifest; their masks are drawn."""

import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cat_diffusion.cat_core.data.folder import Candidate, DataFolder, candidate
from cat_diffusion.cat_core.data.masks import SampleError, opened
from cat_diffusion.cat_core.errors import how_to_install
from cat_diffusion.cat_core.pictures import opening

from .data_sources import SourceError, fractions


def coco(
    instances: Path,
    captions: Path | None,
    images: DataFolder,
    masks: DataFolder,
    split: str,
    as_stored: bool,
    keeps_crowds: bool = False,
) -> Iterator[Candidate]:
    """COCO instances: one sample per annotation that is not a crowd.

    Its id is imageid_annotationid. An annotation without an outline has its box alone.

    Args:
        instances: instances JSON. All of it is read at once: expect ten times its size in memory.
        captions: captions JSON; every object of an image gets the image's first caption.
        images: folder with the images' file_name.
        masks: folder that the drawn masks go to.
        as_stored: whether annotations are of the images before their EXIF data turns them.
        keeps_crowds: take the annotations of many things together, too.
    """
    try:
        rle()
    except ImportError as error:
        raise SourceError(
            f"COCO's masks need pycocotools ({error}). Install it with: "
            f"{how_to_install('requirements-coco.txt')}"
        ) from error
    content = _json(instances, "images", "annotations", "categories")
    pictures = _by(content["images"], "id")
    categories = _by(content["categories"], "id")
    descriptions = {}
    if captions:
        descriptions = _by(_json(captions, "annotations")["annotations"], "image_id")
    for number, annotation in enumerate(content["annotations"]):
        try:
            image_id = id_text(annotation["image_id"])
            annotation_id = id_text(annotation["id"])
            id = f"{image_id}_{annotation_id}"
            if annotation.get("iscrowd") and not keeps_crowds:
                yield Candidate(id, reason="crowd")
                continue
            picture = pictures.get(image_id)
            category = categories.get(id_text(annotation["category_id"]))
            if picture is None or category is None:
                yield Candidate(id, reason="unknown class" if picture else "unknown image")
                continue
            name = str(picture["file_name"])
            width, height = _size(picture, images.path / name, as_stored)
            x, y, box_width, box_height = annotation["bbox"]
            box = fractions(x / width, y / height, box_width / width, box_height / height)
            label = str(category["name"])
        except SampleError as error:
            yield Candidate(id, reason=error.reason)
            continue
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            lacks = f": no {error.args[0]}" if isinstance(error, KeyError) else ""
            yield Candidate(f"annotation {number}", reason=f"malformed annotation{lacks}")
            continue
        segmentation = annotation.get("segmentation")
        mask = None
        draw = None
        if _has_outline(segmentation):
            mask = masks.inside(mask_name(id))
            draw = Drawing(segmentation, width, height).draw
        yield candidate(
            id,
            draw,
            image=images.inside(name),
            mask=mask,
            box=box,
            label=label,
            caption=str(descriptions.get(image_id, {}).get("caption", "")),
            split=split,
        )


def id_text(id: int | float | str) -> str:
    """An id of an image, annotation or category, which COCO counts and other tools name."""
    if isinstance(id, float) and id.is_integer():
        id = int(id)
    if isinstance(id, bool) or not isinstance(id, int | str) or id == "":
        raise TypeError(f"{id!r} is no id")
    return str(id)


def mask_name(id: str) -> str:
    """A file's name for a sample's mask, another one for each sample, valid on every system.

    Folders named by three digits keep them small.
    """
    if not re.fullmatch("[0-9_]{1,100}", id):
        id = hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()
    digits = id.replace("_", "")
    return f"{digits[-3:]:0>3}/{id}.png"


def _size(picture: dict, path: Path, as_stored: bool) -> tuple[int, int]:
    """(W, H) of an image by its entry, or where that says nothing by its file.

    Raises SampleError if there is no such file either.
    """
    if picture.get("width") is not None and picture.get("height") is not None:
        return int(picture["width"]), int(picture["height"])
    with opened(path, "image") as file:
        size = opening.upright_size(file)
        return size[::-1] if as_stored and opening.is_turned(file) else size


def _has_outline(segmentation) -> bool:
    """Whether there is more than a box: detection sets have no polygons, or empty ones."""
    return any(segmentation) if isinstance(segmentation, list) else bool(segmentation)


def rle():
    """pycocotools.mask, which not every Python has."""
    return importlib.import_module("pycocotools.mask")


class Drawing:
    """A mask that is drawn when it is wanted.

    Args:
        segmentation: polygons or run lengths, compressed or not.
        width, height: of the image.
    """

    def __init__(self, segmentation, width: int, height: int):
        self.segmentation = segmentation
        self.width = width
        self.height = height

    def draw(self) -> Image.Image:
        """The mask as a picture of 0 and 255; raises SampleError where it cannot be drawn."""
        try:
            pixels = self._pixels()
        except Exception as error:  # pycocotools raises Exception itself
            raise SampleError("malformed annotation", str(error)) from error
        if not pixels.any():
            raise SampleError("empty mask")
        return Image.fromarray(pixels * 255)

    def _pixels(self) -> np.ndarray:
        """(H, W) uint8 of 0 and 1."""
        if not 0 < self.width * self.height <= Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"the image is {self.width} x {self.height}")
        if isinstance(self.segmentation, list):
            polygons = [self._cut(polygon) for polygon in self.segmentation]
            runs = rle().merge(rle().frPyObjects(polygons, self.height, self.width))
        else:
            runs = rle().frPyObjects(self._checked_runs(), self.height, self.width)
        return rle().decode(runs)

    def _cut(self, polygon: list[float]) -> list[float]:
        """A polygon [x0, y0, x1, y1, ...] without what sticks out of the image."""
        points = np.asarray(polygon, dtype=float).reshape(-1, 2)
        if not np.isfinite(points).all() or len(points) < 3:
            raise ValueError("a polygon needs three points")
        return np.clip(points, 0, (self.width, self.height)).ravel().tolist()

    def _checked_runs(self) -> dict:
        """Run lengths of all pixels of the image, column by column, unmasked first.

        pycocotools believes any: too few leave pixels undefined, too many write past the picture.
        """
        counts = self.segmentation["counts"]
        if isinstance(counts, str):
            lengths = run_lengths(counts)
        else:
            lengths = [int(count) for count in counts]
        size = [self.height, self.width]
        fits = min(lengths) >= 0 and sum(lengths) == self.width * self.height
        if list(self.segmentation["size"]) != size or not fits:
            raise ValueError(f"run lengths of {sum(lengths)} pixels, image {size}")
        return {"size": size, "counts": lengths}


def run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths as numbers.

    They come in groups of five bits, lowest first, from the third on as differences to the last but
    one (rleFrString in pycocotools' maskApi.c).
    """
    counts: list[int] = []
    value = 0
    shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is not part of compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # the number goes on
            continue
        if bits & 16:  # it is negative
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = 0
        shift = 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return counts


def _json(path: Path, *keys: str) -> dict[str, list[dict]]:
    """Lists of a JSON file, as far as their items are objects."""
    lists = {}
    try:
        content = json.loads(path.read_bytes())
        for key in keys:
            lists[key] = [item for item in content[key] if isinstance(item, dict)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SourceError(
            f"{path} is not COCO's ({error!r}), expected JSON with the lists {', '.join(keys)}."
        ) from error
    return lists


def _by(items: list[dict], key: str) -> dict[str, dict]:
    """Items by an id of theirs, the first one where several have the same."""
    by_id = {}
    for item in items:
        try:
            by_id.setdefault(id_text(item[key]), item)
        except (KeyError, TypeError):  # which no annotation can mean
            continue
    return by_id
