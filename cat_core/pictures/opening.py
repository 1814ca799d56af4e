"""Pictures of every kind as 8 bits, upright: Pillow alone, no torch.

Pillow's own convert() knows no range for 16 bits and floats, and makes all of them white or black.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from ..data import members

LEVELS_16 = 65535  # the highest level of 16 bits
WITH_ALPHA = {"RGBA", "LA", "PA", "RGBa", "La"}
ONE_COLOUR = {"P", "L", "RGB"}  # in which PNG and GIF can call one colour transparent
STRAIGHT = {"RGBa": "RGBA", "La": "LA"}  # colours multiplied by alpha -> as they were
TIFF_WIDTH = 256  # a tag
TIFF_HEIGHT = 257
TIFF_BITS = 258
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture as Pillow opens it, its pixels not read yet; raises Pillow's errors and OSError.

    Given a name instead of a file, Pillow maps some TIFF files into memory, and then mixes up the
    pixels of those that their EXIF data turns (Pillow 13.0, TiffImagePlugin.load_end).
    """
    with members.opened(path) as content, Image.open(content) as file:
        yield file


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, turned upright as its EXIF data says.

    Alpha is left out and shows the colours beneath, as ComfyUI's Load Image does.
    Raises ValueError for levels whose range is unknown, and Pillow's errors for broken files.
    """
    return _in_8_bits(picture).convert("RGB")


def as_grey(picture: Image.Image) -> Image.Image:
    """The same as 8-bit grey (L)."""
    return _in_8_bits(picture).convert("L")


def alpha(picture: Image.Image) -> Image.Image | None:
    """The upright alpha of a picture (L, 255 = opaque); None where it has none."""
    has_alpha = picture.mode in WITH_ALPHA
    if not has_alpha and (picture.mode not in ONE_COLOUR or "transparency" not in picture.info):
        return None
    return _in_8_bits(picture).convert("RGBA").getchannel("A")


def is_turned(picture: Image.Image) -> bool:
    """Whether a picture's EXIF data lays it on its side, so that width and height change places.

    To be asked before its pixels are read: Pillow turns a TIFF picture then, and forgets it.
    """
    return orientation(picture) in (5, 6, 7, 8)


def orientation(picture: Image.Image) -> int:
    """How a picture is stored, from 1, upright, to 8, by its EXIF data.

    To be asked before its pixels are read, as is_turned.
    """
    return picture.getexif().get(ExifTags.Base.Orientation, 1)


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(W, H) of the picture turned upright, by its header alone; to be asked as is_turned."""
    tags = getattr(picture, "tag_v2", None)
    width, height = (tags[TIFF_WIDTH], tags[TIFF_HEIGHT]) if tags else picture.size
    return (height, width) if is_turned(picture) else (width, height)


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    """A picture that is stored like this -> the upright one."""
    if orientation not in TURNS:
        return picture
    return picture.transpose(TURNS[orientation])


def extrema(channel: Image.Image) -> tuple[float, float]:
    """The lowest and the highest level of a picture that has one channel."""
    low, high = channel.getextrema()
    assert not isinstance(low, tuple) and not isinstance(high, tuple)  # of one channel
    return low, high


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """The upright picture with levels from 0 to 255, in a mode that Pillow converts rightly."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in STRAIGHT:
        return upright.convert(STRAIGHT[upright.mode])
    if upright.mode.startswith("I"):
        whole_numbers = upright.convert("I")
        return _scaled(whole_numbers.convert("F"), _highest_whole_number(picture, whole_numbers))
    if upright.mode == "F":
        return _scaled(upright, _highest_float(upright))
    return upright


def _scaled(floats: Image.Image, highest: float) -> Image.Image:
    """Mode F from 0 to `highest` -> L, rounded."""
    floats.info.pop("transparency", None)  # a level of the old range
    return floats.point(lambda level: level * (255 / highest) + 0.5).convert("L")


def _highest_whole_number(picture: Image.Image, whole_numbers: Image.Image) -> int:
    """White of a picture with more than 8 bits; TIFF files may have 9 to 15."""
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(TIFF_BITS, (16,))[0]
    white = 2**bits - 1 if bits < 16 else LEVELS_16
    low, high = extrema(whole_numbers)
    if low < 0 or high > white:
        raise ValueError(f"its levels reach from {low} to {high}, expected 0 to {white}")
    return white


def _highest_float(floats: Image.Image) -> float:
    """White of a picture of floats: 1 where none is higher, else 255."""
    low, high = extrema(floats)
    if low >= 0 and high <= 1:
        return 1
    if low >= 0 and high <= 255:
        return 255
    raise ValueError(f"its levels reach from {low:g} to {high:g}, expected 0 to 1 or 0 to 255")
