"""The data sets that prepare_data.py reads: each function yields one Found after another, for good samples and bad.

A file that is not what it should be raises SourceError; a bad line or object in it never does.
"""

import ast
import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from cat_diffusion.cat_core.data.folder import Folder, Found, sample
from cat_diffusion.cat_core.data.masks import SampleError

SEGMENTATION_COLUMNS = (
    "MaskPath",
    "ImageID",
    "LabelName",
    "BoxID",
    "BoxXMin",
    "BoxXMax",
    "BoxYMin",
    "BoxYMax",
)
LONGEST_LINE = 10_000  # characters of one official list line; real ones have about 250


class SourceError(ValueError):
    """A source that cannot be read at all; the message says what was found and what to do."""


def locate(path: Path, manifest: Path) -> Folder:
    """A Folder as `manifest` sees it, links not followed; SourceError if it is none or lies outside of the manifest's."""
    if not path.is_dir():
        raise SourceError(f"{path} is not a folder, expected one with data.")
    try:
        relative = os.path.relpath(path, manifest.parent)
    except ValueError:  # another drive
        relative = os.pardir
    if relative.split(os.sep)[0] == os.pardir:
        above = Path(os.path.abspath(path)).parent / manifest.name
        raise SourceError(
            f"{path} lies outside of {manifest.parent.absolute()}, the manifest's folder, expected it inside. "
            f"Put the manifest above the data, for example --out {above}, or link the data into its folder."
        )
    return Folder(path, "" if relative == os.curdir else relative.replace(os.sep, "/"))


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Corners of a box given by its upper left corner and size, as fractions; raises ValueError if it leaves the image."""
    corners = x, y, x + width, y + height
    if not all(
        -0.01 <= corner <= 1.01 for corner in corners
    ):  # NaN too; within that it is rounding, which is cut off
        raise ValueError(f"the box {corners} leaves the image")
    return tuple(min(max(float(corner), 0.0), 1.0) for corner in corners)


def _first(folders: Iterable[Folder], *names: str) -> str:
    """The manifest's path of the first of `names` that exists in any folder; of the first at all where none does."""
    places = [(folder, name) for folder in folders for name in names]
    folder, name = next(
        (place for place in places if os.path.isfile(place[0].path / place[1])), places[0]
    )
    return folder.inside(name)


# OpenImages ---------------------------------------------------------------------------------------------------------


def openimages(
    classes: Path, annotations: Path, images: list[Folder], masks: list[Folder], split: str
) -> Iterator[Found]:
    """OpenImages V6: one sample per row of the segmentation CSV, its id ImageID_BoxID.

    Args:
        classes: class-descriptions-boxable.csv: LabelName,DisplayName without header.
        annotations: train-annotations-object-segmentation.csv or its validation or test counterpart.
        images: folders with ImageID.jpg.
        masks: folders with the PNG files, flat or in subfolders named by the first hex digit.
    """
    with open(classes, encoding="utf-8-sig", errors="replace", newline="") as file:
        names = {row[0]: row[1] for row in csv.reader(file) if len(row) == 2}
    if not names:
        raise SourceError(
            f"{classes} names no class, expected lines such as /m/01bjv,Bus (class-descriptions-boxable.csv)."
        )
    with open(annotations, encoding="utf-8-sig", errors="replace", newline="") as file:
        # The official files quote nothing: a stray quotation mark must not swallow the lines after it.
        rows = csv.DictReader(file, quoting=csv.QUOTE_NONE)
        if missing := [
            name for name in SEGMENTATION_COLUMNS if name not in (rows.fieldnames or ())
        ]:
            raise SourceError(
                f"{annotations} has no column {missing[0]}, expected the columns "
                f"{','.join(SEGMENTATION_COLUMNS)} (train-annotations-object-segmentation.csv)."
            )
        while True:
            try:
                row = next(rows)
                id = f"{row['ImageID']}_{row['BoxID']}"
                x0, x1, y0, y1 = (float(row[name]) for name in SEGMENTATION_COLUMNS[4:])
                box, mask = _box(x0, y0, x1 - x0, y1 - y0), row["MaskPath"]
                image = _first(images, f"{row['ImageID']}.jpg")
                mask = _first(masks, mask, f"{mask[:1]}/{mask}", f"{mask[:1].upper()}/{mask}")
            except StopIteration:
                return
            except (
                csv.Error,
                TypeError,
                ValueError,
            ):  # too long a line, too few columns, no numbers
                yield Found(f"line {rows.line_num}", reason="malformed line")
            else:
                if row["LabelName"] not in names:
                    yield Found(id, reason="unknown class")
                else:
                    yield sample(
                        id,
                        image=image,
                        mask=mask,
                        box=box,
                        label=names[row["LabelName"]],
                        split=split,
                    )


# COCO ---------------------------------------------------------------------------------------------------------------


def coco(
    instances: Path, captions: Path | None, images: Folder, masks: Folder, split: str
) -> Iterator[Found]:
    """COCO instances: one sample per annotation that is not a crowd, its id imageid_annotationid; masks are drawn.

    Args:
        instances: instances JSON. All of it is read at once: expect ten times its size in memory.
        captions: captions JSON; every object of an image gets the image's first caption.
        images: folder with the images' file_name.
        masks: folder that the drawn masks go to.
    """
    try:
        from pycocotools import mask as rle
    except ImportError as error:
        raise SourceError(
            f"COCO's masks need pycocotools ({error}). Run: pip install -r requirements-train.txt"
        ) from error
    content = _json(instances, "images", "annotations", "categories")
    pictures, names = _by(content["images"], "id"), _by(content["categories"], "id")
    described = _by(_json(captions, "annotations")["annotations"], "image_id") if captions else {}
    for number, annotation in enumerate(content["annotations"]):
        try:
            image_id, annotation_id = int(annotation["image_id"]), int(annotation["id"])
            id = f"{image_id}_{annotation_id}"
            if annotation.get("iscrowd"):
                yield Found(id, reason="crowd")
                continue
            picture, segmentation = pictures[image_id], annotation["segmentation"]
            width, height = int(picture["width"]), int(picture["height"])
            x, y, w, h = annotation["bbox"]
            box = _box(x / width, y / height, w / width, h / height)
            image, label = (
                images.inside(str(picture["file_name"])),
                str(names[annotation["category_id"]]["name"]),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError):
            yield Found(f"annotation {number}", reason="malformed annotation")
            continue

        def draw(segmentation=segmentation, width=width, height=height) -> Image.Image:
            return _draw(rle, segmentation, width, height)

        yield sample(
            id,
            draw,
            image=image,
            mask=masks.inside(f"{annotation_id % 1000:03d}/{annotation_id}.png"),
            box=box,
            label=label,
            caption=str(described.get(image_id, {}).get("caption", "")),
            split=split,
        )


def _json(path: Path, *keys: str) -> dict[str, list[dict]]:
    try:
        content = json.loads(path.read_bytes())
        return {key: [item for item in content[key] if isinstance(item, dict)] for key in keys}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SourceError(
            f"{path} is not COCO's ({error!r}), expected JSON with the lists {', '.join(keys)}."
        ) from error


def _by(items: list[dict], key: str) -> dict[int, dict]:
    """Items by an integer of theirs, the first one where several have the same."""
    return {item[key]: item for item in reversed(items) if isinstance(item.get(key), int)}


def _draw(rle, segmentation, width: int, height: int) -> Image.Image:
    """Polygons or run lengths, compressed or not -> a picture of 0 and 255."""
    import numpy as np

    try:
        if not 0 < width * height <= Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"the image is {width} x {height}")
        if isinstance(segmentation, list):
            polygons = [np.asarray(polygon, dtype=float).reshape(-1, 2) for polygon in segmentation]
            if not all(np.isfinite(polygon).all() and len(polygon) >= 3 for polygon in polygons):
                raise ValueError("a polygon needs three points")
            segmentation = [
                np.clip(polygon, 0, (width, height)).ravel().tolist() for polygon in polygons
            ]
        else:
            counts = segmentation["counts"]
            counts = (
                _run_lengths(counts)
                if isinstance(counts, str)
                else [int(count) for count in counts]
            )
            # pycocotools believes any run lengths: too few leave pixels undefined, too many write past the picture.
            if (
                list(segmentation["size"]) != [height, width]
                or min(counts) < 0
                or sum(counts) != width * height
            ):
                raise ValueError(f"run lengths of {sum(counts)} pixels, image {[height, width]}")
            segmentation = {"size": [height, width], "counts": counts}
        runs = rle.frPyObjects(segmentation, height, width)
        pixels = rle.decode(rle.merge(runs) if isinstance(runs, list) else runs)
    except Exception as error:  # pycocotools raises Exception itself
        raise SampleError("malformed annotation", str(error)) from error
    if not pixels.any():
        raise SampleError("empty mask")
    return Image.fromarray(pixels * 255)


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths: numbers in groups of five bits, from the third on as differences to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is not part of compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end within a number")
    return counts


# Official lists -----------------------------------------------------------------------------------------------------


def official(listing: Path, images: Folder, masks: Folder, split: str) -> Iterator[Found]:
    """The official repository's list files: one Python dict a line, read as a literal and never evaluated.

        {'mask_image': 'masks/6/611c.png', 'label': 'Bus', 'box_id': '8ae4', 'area': 0.421, 'image_id': '611c',
         'box': [0.234, 0.285, 0.766, 0.55], 'image': 'data/611c.jpg'}
        {'image_name': 'part-00000/1.jpg', 'text': 'a harbour at night'}

    The box is [x, y, width, height] as fractions: the upper left corner first, and area = width * height. Lines of the
    second form are hole-free images with a caption. Ids are image_id_box_id, or the list's name and the line's number.
    """
    with open(listing, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                if len(line) > LONGEST_LINE:
                    raise ValueError("line too long")
                item = ast.literal_eval(line.strip())
                if "image_name" in item:
                    found = sample(
                        f"{listing.stem}_{number}",
                        image=images.inside(item["image_name"]),
                        caption=item["text"],
                        split=split,
                    )
                else:
                    x, y, width, height = item["box"]
                    found = sample(
                        f"{item['image_id']}_{item['box_id']}",
                        image=images.inside(item["image"]),
                        mask=masks.inside(item["mask_image"]),
                        box=_box(x, y, width, height),
                        label=item["label"],
                        split=split,
                    )
            except (
                ValueError,
                SyntaxError,
                TypeError,
                KeyError,
                AttributeError,
                RecursionError,
                MemoryError,
            ):
                found = Found(f"line {number}", reason="malformed line")
            yield found
