"""A record's pictures, and the holes that training cuts: Pillow alone, no torch."""

import os
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from ..errors import CatError
from .manifest import Box, Record

VARIANTS = ("segment", "box")  # how the hole is made of the object's mask
HOLE_SIZE = 512  # pixels, the official working size
MASKED = 128  # grey level from which a pixel counts as masked
BINARY = [0] * MASKED + [255] * (256 - MASKED)  # each grey level -> unmasked or masked


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
        SampleError: its reason is missing image, corrupt image, missing mask, corrupt mask or empty
            mask.
    """
    image = _picture(Path(folder, record.image), "image", "RGB")
    if not record.hole:
        return image, None
    mask = _mask(record, folder, image.size)
    if _object_box(mask) is None:
        raise SampleError(
            "empty mask",
            f"{record.mask or record.box} reaches {mask.getextrema()[1]} of 255 at the image's "
            "size, expected white where the object is",
        )
    return image, mask


def _mask(record: Record, folder: str | os.PathLike, size: tuple[int, int]) -> Image.Image:
    if record.mask is not None:
        mask = _picture(Path(folder, record.mask), "mask", "L")
        if mask.size == size:
            return mask
        return mask.resize(size, Image.Resampling.BICUBIC)
    assert record.box is not None  # one of the two makes the hole
    return box_mask(record.box, size)


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
    box = _object_box(mask_512)
    if box is None:
        raise SampleError(
            "empty mask",
            f"it reaches {mask_512.getextrema()[1]} of 255 at {HOLE_SIZE}x{HOLE_SIZE}; the object "
            "is too small",
        )
    if variant == "segment":
        return mask_512.filter(ImageFilter.MaxFilter(5))
    hole.paste(255, box)
    return hole


def _object_box(mask: Image.Image) -> tuple[int, int, int, int] | None:
    """What a mask masks, in pixels."""
    return mask.point(BINARY).getbbox()


def _picture(path: Path, kind: str, mode: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert(mode)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SampleError(f"missing {kind}", f"{path} is not a file") from error
    # For what is broken Pillow raises OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise SampleError(f"corrupt {kind}", f"{path} cannot be decoded ({error})") from error
