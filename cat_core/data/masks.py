"""A record's pictures, and the holes that training cuts: Pillow and numpy, no torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import CatError
from ..pictures import opening
from . import members
from .manifest import Box, Record

VARIANTS = ("segment", "box")  # how training makes the hole of the object's mask
OFFICIAL_BOX = "official-box"  # how the official inference draws it of the annotation's box
HOLES = (*VARIANTS, OFFICIAL_BOX)  # how a test makes it
HOLE_SIZE = 512  # pixels, the official working size
REACH = 2  # pixels by which a segment grows: a dilation by 5x5
MASKED = 128  # grey level from which a pixel counts as masked
BINARY = [0] * MASKED + [255] * (256 - MASKED)  # each grey level -> unmasked or masked
SHAPE_TOLERANCE = 0.02  # of the proportion of its sides, by which a mask may differ from its image
TURNED = "mask of the image before its EXIF turn"  # a sample's reason
OTHER_VALUES = "expected 0 and 255"  # how a sample's reason ends
COLOURED = 32  # levels by which the channels of a colour differ that is not grey


class SampleError(CatError):
    """One sample that cannot be used: `reason` is for counting, `detail` for reading."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both, to survive pickling between worker processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def load(record: Record, folder: str | os.PathLike) -> tuple[Image.Image, Image.Image | None]:
    """Open a record's pictures, turned upright as their EXIF data says.

    Args:
        folder: the manifest's.
    Returns:
        The picture (RGB) and its mask (L, of the same size, 255 = object), drawn from the box where
        the record has no mask picture; None for a hole-free image. A mask picture of another size
        is resized, bicubic, to the image's.
    Raises:
        SampleError: an image or mask is missing, corrupt or of another shape, or the mask is empty
            or not of 0 and 255.
    """
    with opened(Path(folder, record.image), "image") as file:
        turned = opening.is_turned(file)
        image = opening.as_rgb(file)
    if not record.hole:
        return image, None
    if record.mask is None:
        assert record.box is not None  # one of the two makes the hole
        mask = box_mask(record.box, image.size)
    else:
        mask = read_mask(Path(folder, record.mask))
        check_shape(mask, image.size, turned)
        if mask.size != image.size:
            mask = mask.resize(image.size, Image.Resampling.BICUBIC)
    if object_box(mask) is None:
        raise SampleError(
            "empty mask",
            f"{record.mask or record.box} reaches {mask.getextrema()[1]} of 255 at the image's "
            "size, expected white where the object is",
        )
    return image, mask


def read_mask(path: Path) -> Image.Image:
    """Open a mask picture: L, 255 = object, turned upright as its EXIF data says.

    It lies in the file's alpha, opaque = object, where that differs from pixel to pixel; else in
    the brightness of its colours.
    Raises SampleError: missing mask, corrupt mask, empty mask, or values other than 0 and 255.
    """
    with opened(path, "mask") as file:
        mask = opening.alpha(file)
        if mask is None or not _varies(mask):
            mask = opening.as_grey(file)
            _check_palette(file, path)
    _, lightest = opening.extrema(mask)
    if lightest == 0:
        raise SampleError("empty mask", f"{path} is black, expected white where the object is")
    if lightest < MASKED:
        raise SampleError(
            f"mask reaches {lightest} of 255, {OTHER_VALUES}",
            f"{path} has other values. tools/prepare_data.py takes them with --mask-values.",
        )
    return mask


def check_shape(mask: Image.Image, size: tuple[int, int], turned: bool) -> None:
    """Raise SampleError unless a mask's sides have the image's proportion, as far as both tell.

    Two per cent and one pixel of the mask are granted.

    Args:
        size: the upright image's (W, H).
        turned: whether EXIF data has turned the image onto its side.
    """
    if same_shape(mask.size, size):
        return
    width, height = size
    found = f"the mask is {mask.width}x{mask.height}, the image {width}x{height}"
    if turned and same_shape(mask.size, (height, width)):
        raise SampleError(
            TURNED,
            f"{found}, turned by its EXIF data. tools/prepare_data.py turns such masks with "
            "--turn-masks.",
        )
    raise SampleError(
        "mask of another shape",
        f"{found}, expected sides in the same proportion. Crop or draw the mask for this image.",
    )


def same_shape(mask_size: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether two sizes (W, H) have the same proportion, as check_shape grants it."""
    mask_width, mask_height = mask_size
    width, height = size
    fitting_width = mask_height * width / height
    fitting_height = mask_width * height / width
    return (
        abs(mask_width - fitting_width) <= max(1, SHAPE_TOLERANCE * fitting_width)
        or abs(mask_height - fitting_height) <= 1
    )


def box_mask(box: Box, size: tuple[int, int]) -> Image.Image:
    """Draw a box as a mask: `size` is (W, H); L, 255 = object.

    Corners are truncated to pixels, as the official code does.
    """
    width, height = size
    x0, y0, x1, y1 = box
    mask = Image.new("L", size)
    mask.paste(255, (int(x0 * width), int(y0 * height), int(x1 * width), int(y1 * height)))
    return mask


def training_mask(mask: Image.Image | None, variant: str) -> Image.Image:
    """The object's mask of any size -> the hole at 512x512, 8 bits, white = repaint.

    Args:
        mask: None for a hole-free image, whose hole is black.
        variant: segment, the mask dilated by 5x5, or box, its bounding box.
    Raises:
        SampleError: empty mask; the object is so small that nothing of it is left at 512x512.
    """
    hole = Image.new("L", (HOLE_SIZE, HOLE_SIZE))
    if mask is None:
        return hole
    mask_512 = mask.resize(hole.size, Image.Resampling.BICUBIC)
    box = object_box(mask_512)
    if box is None:
        raise SampleError(
            "empty mask",
            f"it reaches {mask_512.getextrema()[1]} of 255 at {HOLE_SIZE}x{HOLE_SIZE}; the object "
            "is too small",
        )
    if variant == "segment":
        return dilated(mask_512)
    hole.paste(255, box)
    return hole


def cut_hole(record: Record, mask: Image.Image | None, kind: str) -> Image.Image:
    """The hole that a test cuts, at 512x512, 8 bits, white = repaint.

    Args:
        mask: of the object, any size, as `load` returns it.
        kind: segment or box as in training, or official-box, see `official_box`.
    Raises:
        SampleError: empty mask; official-box of a record without a box.
    """
    if kind != OFFICIAL_BOX:
        return training_mask(mask, kind)
    if record.box is None:
        raise SampleError(
            "no box",
            "official-box is drawn from the annotation's box, and the record has none; add it to "
            "the manifest, or take box, which is found from the mask",
        )
    return official_box(record.box)


def official_box(box: Box) -> Image.Image:
    """A box at 512x512 as the official inference draws it: L, 255 = repaint.

    cv2.rectangle fills corners truncated to pixels, and the right and lower edge belong to the box
    (dataset.py, OpenimagesBoxDataset).
    """
    hole = Image.new("L", (HOLE_SIZE, HOLE_SIZE))
    left, top, right, bottom = (int(corner * HOLE_SIZE) for corner in box)
    last = HOLE_SIZE - 1
    hole.paste(255, (left, top, min(right, last) + 1, min(bottom, last) + 1))
    return hole


def dilated(mask: Image.Image) -> Image.Image:
    """Each pixel as the lightest of the 5x5 around it.

    As ImageFilter.MaxFilter(5), along one axis after the other, which takes a fraction of its time.
    """
    levels = np.asarray(mask)
    for axis in (0, 1):
        lightest = levels.copy()
        for shift in range(1, REACH + 1):
            later = np.moveaxis(levels, axis, 0)
            target = np.moveaxis(lightest, axis, 0)
            np.maximum(target[shift:], later[:-shift], out=target[shift:])
            np.maximum(target[:-shift], later[shift:], out=target[:-shift])
        levels = lightest
    return Image.fromarray(levels)


def object_box(mask: Image.Image) -> tuple[int, int, int, int] | None:
    """What a mask masks, in pixels."""
    return mask.point(BINARY).getbbox()


def _varies(channel: Image.Image) -> bool:
    low, high = opening.extrema(channel)
    return low < high


def _check_palette(file: Image.Image, path: Path) -> None:
    """Raise SampleError where a palette names several things by colours, as VOC's masks do."""
    if file.mode != "P":
        return
    used = file.getcolors() or []  # at most 256
    colours = file.convert("RGB").getcolors() or []
    coloured = False
    for _, colour in colours:
        assert isinstance(colour, tuple)  # red, green, blue
        coloured = coloured or max(colour) - min(colour) > COLOURED
    if coloured and len(used) > 2:
        values = ", ".join(str(value) for _, value in sorted(used, key=itemgetter(1))[:8])
        raise SampleError(
            f"mask of {len(used)} colours, {OTHER_VALUES}",
            f"{path} holds the palette's values {values}. tools/prepare_data.py takes them with "
            "--mask-values.",
        )


@contextmanager
def opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """A file as Pillow opens it; what goes wrong inside becomes a SampleError.

    Args:
        kind: image or mask, for the reason.
    """
    try:
        with opening.opened(path) as file:
            yield file
    except SampleError:
        raise
    except members.CutShardError as error:
        detail = f"{error}. Fetch or copy the shard again."
        raise SampleError("shard cut short", detail) from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SampleError(f"missing {kind}", f"{path} is not a file") from error
    # For what is broken Pillow raises OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise SampleError(f"corrupt {kind}", f"{path} cannot be decoded ({error})") from error
