"""The data sets that prepare_data.py reads; COCO has a file of its own.

Each function yields one Candidate after another, for good samples and bad. A file that is not what
it should be raises SourceError; a bad line or object in it never does.
"""

import ast
import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cat_diffusion.cat_core.data.folder import Candidate, DataFolder, candidate

BOX_COLUMNS = ("BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax")
SEGMENTATION_COLUMNS = ("MaskPath", "ImageID", "LabelName", "BoxID", *BOX_COLUMNS)
LONGEST_LINE = 10_000  # characters of one official list line; real ones have about 250
ROUNDING = 0.01  # of an image's side, by which a box may leave it


class SourceError(ValueError):
    """A source that cannot be read at all; the message says what was found and what to do."""


def locate(path: Path, manifest: Path) -> DataFolder:
    """A DataFolder as `manifest` sees it, links not followed.

    Raises SourceError if it is no folder, or lies outside of the manifest's.
    """
    if not path.is_dir():
        raise SourceError(f"{path} is not a folder, expected one with data.")
    try:
        relative = os.path.relpath(path, manifest.parent)
    except ValueError:  # another drive
        relative = os.pardir
    if relative.split(os.sep)[0] == os.pardir:
        above = Path(os.path.abspath(path)).parent / manifest.name
        raise SourceError(
            f"{path} lies outside of {manifest.parent.absolute()}, the manifest's folder, "
            "expected it inside. Put the manifest above the data, "
            f"for example --out {above}, or link the data into its folder."
        )
    return DataFolder(path, "" if relative == os.curdir else relative.replace(os.sep, "/"))


def fractions(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Corners of a box given by its upper left corner and size, all in [0, 1].

    Raises ValueError if it leaves the image by more than rounding, which is cut off.
    """
    corners = (x, y, x + width, y + height)
    inside = []
    for corner in corners:
        if not -ROUNDING <= corner <= 1 + ROUNDING:  # NaN too
            raise ValueError(f"the box {corners} leaves the image")
        inside.append(min(max(float(corner), 0.0), 1.0))
    x0, y0, x1, y1 = inside
    return x0, y0, x1, y1


# OpenImages ---------------------------------------------------------------------------------------


def openimages(
    classes: Path,
    annotations: Path,
    images: list[DataFolder],
    masks: list[DataFolder],
    split: str,
) -> Iterator[Candidate]:
    """OpenImages V6: one sample per row of the segmentation CSV, its id ImageID_BoxID.

    Args:
        classes: class-descriptions-boxable.csv: LabelName,DisplayName without header.
        annotations: train-annotations-object-segmentation.csv or its validation or test
            counterpart.
        images: folders with ImageID.jpg.
        masks: folders with the PNG files, flat or in subfolders named by the first hex digit.
    """
    names = _class_names(classes)
    with open(annotations, encoding="utf-8-sig", errors="replace", newline="") as file:
        # The official files quote nothing: a stray quotation mark must not swallow the lines after.
        rows = csv.DictReader(file, quoting=csv.QUOTE_NONE)
        for column in SEGMENTATION_COLUMNS:
            if column not in (rows.fieldnames or ()):
                raise SourceError(
                    f"{annotations} has no column {column}, expected the columns "
                    f"{','.join(SEGMENTATION_COLUMNS)} (train-annotations-object-segmentation.csv)."
                )
        while True:
            try:
                row = next(rows)
                fields = _segmentation(row, images, masks)
            except StopIteration:
                return
            # Too long a line, too few columns, no numbers.
            except (csv.Error, TypeError, ValueError):
                yield Candidate(f"line {rows.line_num}", reason="malformed line")
                continue
            id = f"{row['ImageID']}_{row['BoxID']}"
            if row["LabelName"] in names:
                yield candidate(id, label=names[row["LabelName"]], split=split, **fields)
            else:
                yield Candidate(id, reason="unknown class")


def _class_names(path: Path) -> dict[str, str]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        names = dict(row for row in csv.reader(file) if len(row) == 2)
    if not names:
        raise SourceError(
            f"{path} names no class, expected lines such as /m/01bjv,Bus "
            "(class-descriptions-boxable.csv)."
        )
    return names


def _segmentation(
    row: dict[str, str], images: list[DataFolder], masks: list[DataFolder]
) -> dict[str, object]:
    """Image, mask and box of a row; raises TypeError or ValueError where it is malformed."""
    x0, x1, y0, y1 = (float(row[column]) for column in BOX_COLUMNS)
    mask = row["MaskPath"]
    first_digit = mask[:1]
    mask_places = (mask, f"{first_digit}/{mask}", f"{first_digit.upper()}/{mask}")
    return {
        "image": _first(images, f"{row['ImageID']}.jpg"),
        "mask": _first(masks, *mask_places),
        "box": fractions(x0, y0, x1 - x0, y1 - y0),
    }


def _first(folders: Iterable[DataFolder], *names: str) -> str:
    """The manifest's path of the first of `names` that exists in any folder.

    Where none does, of the first one in the first folder.
    """
    places = [(folder, name) for folder in folders for name in names]
    for folder, name in places:
        if os.path.isfile(folder.path / name):
            return folder.inside(name)
    folder, name = places[0]
    return folder.inside(name)


# Official lists -----------------------------------------------------------------------------------


def official(
    listing: Path, images: DataFolder, masks: DataFolder, split: str
) -> Iterator[Candidate]:
    """The official repository's list files: one Python dict a line.

        {'mask_image': 'masks/6/611c.png', 'label': 'Bus', 'box_id': '8ae4', 'area': 0.421,
         'image_id': '611c', 'box': [0.234, 0.285, 0.766, 0.55], 'image': 'data/611c.jpg'}
        {'image_name': 'part-00000/1.jpg', 'text': 'a harbour at night'}

    It is read as a literal and never evaluated. The box is [x, y, width, height] as fractions: the
    upper left corner first, and area = width * height. Lines of the second form are hole-free
    images with a caption. Ids are image_id_box_id, or the list's name and the line's number.
    """
    malformed = (
        ValueError,
        SyntaxError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        MemoryError,
    )
    with open(listing, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                item = _literal(line)
                if "image_name" in item:
                    yield candidate(
                        f"{listing.stem}_{number}",
                        image=images.inside(item["image_name"]),
                        caption=item["text"],
                        split=split,
                    )
                else:
                    x, y, width, height = item["box"]
                    yield candidate(
                        f"{item['image_id']}_{item['box_id']}",
                        image=images.inside(item["image"]),
                        mask=masks.inside(item["mask_image"]),
                        box=fractions(x, y, width, height),
                        label=item["label"],
                        split=split,
                    )
            except malformed:
                yield Candidate(f"line {number}", reason="malformed line")


def _literal(line: str):
    if len(line) > LONGEST_LINE:
        raise ValueError("line too long")
    return ast.literal_eval(line.strip())
