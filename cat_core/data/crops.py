"""Training pictures as the official training code cuts them: a square around the object.

Squashed pictures, which keep all of the picture and not its proportion, are in masks.py.
"""

from typing import NamedTuple

from PIL import Image

from .manifest import Record
from .masks import HOLE_SIZE, SampleError, box_mask, dilated, object_box


class Chance(NamedTuple):
    """What is drawn for one sample, each uniformly from [0, 1)."""

    top: float
    left: float
    flip: float
    caption: float


def cropped(
    record: Record,
    picture: Image.Image,
    mask: Image.Image | None,
    variant: str,
    chance: Chance,
    flip: bool = False,
) -> tuple[Image.Image, Image.Image]:
    """The short side to 512, bilinear, and from the long one 512 pixels around the object.

    Args:
        picture, mask: as masks.load gives them.
        variant: segment, the mask dilated by 5x5 at its own size, or box: the record's own, or
            where it has none the mask's.
        flip: mirror half of the pictures.
    Returns:
        The picture (RGB) and its hole (L, white = repaint), both 512x512. Both variants show the
        same part of the picture.
    Raises:
        SampleError: the object is so small that nothing of it is left.
    """
    resized = _resized(picture)
    box = None
    hole = Image.new("L", resized.size)
    if mask is not None:
        box = object_box(_resized(mask))
        if box is None:
            raise SampleError("empty mask", "the object is too small at 512 pixels")
        hole = _resized(_hole(record, mask, variant))
    width, height = resized.size
    left, top, right, bottom = box or (None, None, None, None)
    x = _start(left, right, width, chance.left)
    y = _start(top, bottom, height, chance.top)
    square = (x, y, x + HOLE_SIZE, y + HOLE_SIZE)
    pictures = [resized.crop(square), hole.crop(square)]
    if flip and chance.flip < 0.5:
        pictures = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in pictures]
    picture_512, hole_512 = pictures
    return picture_512, hole_512


def _hole(record: Record, mask: Image.Image, variant: str) -> Image.Image:
    """What is hidden, at the picture's own size."""
    if variant == "segment":
        return dilated(mask)
    if record.box is not None:
        return box_mask(record.box, mask.size)
    hole = Image.new("L", mask.size)
    hole.paste(255, object_box(mask))
    return hole


def _resized(picture: Image.Image) -> Image.Image:
    """The short side 512 pixels long, as torchvision's Resize(512) makes it."""
    width, height = picture.size
    if width < height:
        size = (HOLE_SIZE, int(HOLE_SIZE * height / width))
    else:
        size = (int(HOLE_SIZE * width / height), HOLE_SIZE)
    return picture.resize(size, Image.Resampling.BILINEAR)


def _start(first: int | None, end: int | None, length: int, chance: float) -> int:
    """Where 512 pixels of an axis begin; with an object, so that they show it as far as they can.

    The bounds are the official ones (mldm/util.py, crop_512).
    """
    last = length - HOLE_SIZE
    if first is None or end is None:
        return int(chance * (last + 1))
    lowest = min(max(0, end - 1 - HOLE_SIZE), first)
    highest = max(min(first, last), 0)
    return lowest + int(chance * (highest - lowest + 1))
