"""Pictures of every mode that files have, and what their pixels must be in 8 bits."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cat_diffusion.cat_core.data import masks
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.pictures import opening

LEVELS = np.array([[0, 1, 64], [128, 200, 255]], np.uint8)
COLOURS = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]], axis=2)
ALPHA = np.array([[0, 255, 128], [255, 64, 255]], np.uint8)


def grey_16(path):
    Image.fromarray(LEVELS.astype(np.uint16) * 257).save(path)


def grey_16_big_endian(path):
    """A TIFF of the other byte order, which Pillow does not write."""
    levels = (LEVELS.astype(">u2") * 257).astype(">u2")
    path.write_bytes(tiff(">", bits=16, pixels=levels.tobytes()))


def grey_12(path):
    """Two pixels in three bytes, a row at a time."""
    pixels = bytearray()
    for row in np.round(LEVELS / 255 * 4095).astype(int):
        digits = "".join(f"{level:03x}" for level in row)
        pixels += bytes.fromhex(digits + "0" * (len(digits) % 2))
    path.write_bytes(tiff("<", bits=12, pixels=bytes(pixels)))


def tiff(order, *, bits, pixels):
    """An uncompressed grey TIFF of 3x2 pixels."""
    tags = [(256, 3), (257, 2), (258, bits), (259, 1), (262, 1)]
    tags += [(273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 2), (279, len(pixels))]
    content = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    content += struct.pack(order + "H", len(tags))
    for tag, value in tags:
        content += struct.pack(order + "HHII", tag, 4, 1, value)
    return content + struct.pack(order + "I", 0) + pixels


def of_mode(mode, **options):
    def write(path):
        Image.fromarray(LEVELS).convert(mode).save(path, **options)

    return write


def floats(highest):
    def write(path):
        Image.fromarray((LEVELS / 255 * highest).astype(np.float32)).save(path)

    return write


def grey_with_alpha(path):
    Image.fromarray(np.stack([LEVELS, ALPHA], axis=2), "LA").save(path)


def palette_with_transparency(path):
    picture = Image.fromarray(LEVELS).convert("P")
    picture.save(path, transparency=128)


def deep_grey_with_transparency(path):
    Image.fromarray(LEVELS.astype(np.uint16) * 257).save(path, transparency=300)


@pytest.mark.parametrize(
    "name, write",
    [
        ("x.png", of_mode("L")),
        ("x.png", of_mode("P")),
        ("x.gif", of_mode("P")),
        ("x.png", grey_16),
        ("x.tif", grey_16),
        ("x.jp2", grey_16),
        ("x.tif", grey_16_big_endian),
        ("x.tif", grey_12),
        ("x.tif", floats(1)),
        ("x.tif", floats(255)),
        ("x.png", grey_with_alpha),
        ("x.tif", grey_with_alpha),
        ("x.png", palette_with_transparency),
        ("x.gif", palette_with_transparency),
        ("x.png", deep_grey_with_transparency),
    ],
)
def test_grey_pictures_keep_their_levels(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    with opening.opened(path) as file:
        rgb = opening.as_rgb(file)
        grey = opening.as_grey(file)
    assert rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb), np.stack([LEVELS] * 3, axis=2))
    assert grey.mode == "L"
    assert np.array_equal(np.asarray(grey), LEVELS)


def colours_16(path):
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    lines = b"".join(b"\0" + row.tobytes() for row in COLOURS.astype(">u2") * 257)

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def of_colour_mode(mode):
    def write(path):
        picture = Image.fromarray(np.dstack([COLOURS, ALPHA]), "RGBA")
        picture.convert(mode).save(path)

    return write


@pytest.mark.parametrize(
    "name, write",
    [
        ("x.png", of_colour_mode("RGB")),
        ("x.bmp", of_colour_mode("RGB")),
        ("x.png", of_colour_mode("RGBA")),
        ("x.tif", of_colour_mode("RGBA")),
        ("x.tif", of_colour_mode("RGBX")),
        ("x.tif", of_colour_mode("CMYK")),
        ("x.png", colours_16),
    ],
)
def test_coloured_pictures_keep_their_levels(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    with opening.opened(path) as file:
        rgb = opening.as_rgb(file)
    assert rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb), COLOURS)


@pytest.mark.parametrize("mode, straight", [("RGBa", "RGBA"), ("La", "LA")])
def test_colours_multiplied_by_alpha_are_divided_again(mode, straight):
    half = Image.new(straight, (2, 2), (200,) * (len(straight) - 1) + (128,))
    multiplied = half.convert(mode)
    assert np.asarray(multiplied)[0, 0, 0] == 100
    assert np.abs(np.asarray(opening.as_rgb(multiplied)).astype(int) - 200).max() <= 1


def test_levels_without_a_known_range_are_errors():
    for lowest, highest in ((-1, 0.5), (0, 3000)):
        levels = np.array([[lowest, highest]], np.float32)
        with pytest.raises(ValueError, match=rf"from {lowest} to {highest}, expected 0 to 1 or"):
            opening.as_rgb(Image.fromarray(levels))
    with pytest.raises(ValueError, match="from 0 to 70000, expected 0 to 65535"):
        opening.as_rgb(Image.fromarray(np.array([[0, 70_000]], np.int32)))


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "I;16", "F"])
def test_every_mode_is_turned_upright(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    stored = Image.new("L", (40, 30))
    stored.paste(255, (0, 20, 10, 30))  # the lower left corner
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
    path = tmp_path / "x.tif"
    stored.convert(mode).save(path, exif=exif)
    with opening.opened(path) as file:
        assert opening.is_turned(file)
        upright = opening.as_grey(file)
    assert upright.size == (30, 40)
    assert upright.getbbox() == (0, 0, 10, 10)


# Masks --------------------------------------------------------------------------------------------

BOX = (10, 5, 30, 20)
SIZE = (40, 30)


def object_mask(level=255):
    mask = Image.new("L", SIZE)
    mask.paste(level, BOX)
    return mask


def load(folder, mask, picture=None, **options):
    (picture or Image.new("RGB", SIZE)).save(folder / "x.jpg", **options)
    mask.save(folder / "m.png")
    return masks.load(Record("x", "x.jpg", "m.png", label="cup"), folder)


def reason(folder, mask, *arguments, **options):
    with pytest.raises(SampleError) as error:
        load(folder, mask, *arguments, **options)
    return str(error.value)


def test_a_records_picture_of_16_bits_is_not_white(tmp_path):
    levels = np.full(SIZE[::-1], 100 * 257, np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    picture, _ = masks.load(Record("x", "x.png", label="cup"), tmp_path)
    assert picture.getextrema() == ((100, 100),) * 3


@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_a_mask_may_lie_in_alpha(tmp_path, colour):
    mask = Image.new("RGBA", SIZE, colour)
    mask.putalpha(object_mask())
    _, hole = load(tmp_path, mask)
    assert hole.getbbox() == BOX
    assert hole.getextrema() == (0, 255)


@pytest.mark.parametrize("alpha", [255, 0, 128])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_that_is_the_same_everywhere_says_nothing(tmp_path, mode, alpha):
    mask = object_mask().convert(mode)
    mask.putalpha(alpha)
    _, hole = load(tmp_path, mask)
    assert hole.getbbox() == BOX


def test_masks_of_16_bits_and_grey_palettes_are_masks(tmp_path):
    deep = Image.fromarray(np.asarray(object_mask()).astype(np.uint16) * 257)
    grey_palette = object_mask().convert("P")
    for mask in (deep, grey_palette):
        _, hole = load(tmp_path, mask)
        assert hole.getbbox() == BOX
        assert hole.getextrema() == (0, 255)


def palette_mask(values=(1,)):
    """A mask as VOC has it: black, and values in colours of their own."""
    mask = Image.new("P", SIZE)
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 255, 255, 0])
    for place, value in enumerate(values):
        mask.paste(value, (10 + place, 5, 30, 20))
    return mask


def test_other_values_than_0_and_255_are_named(tmp_path):
    assert "mask reaches 1 of 255, expected 0 and 255: " in reason(tmp_path, object_mask(1))
    assert "mask reaches 38 of 255, expected 0 and 255: " in reason(tmp_path, palette_mask())
    several = reason(tmp_path, palette_mask((1, 3)))
    assert several.startswith("mask of 3 colours, expected 0 and 255: ")
    assert "holds the palette's values 0, 1, 3." in several
    for message in (several, reason(tmp_path, object_mask(1))):
        assert "--mask-values" in message
    assert "is black, expected white" in reason(tmp_path, object_mask(0))


def test_a_mask_is_never_squeezed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert reason(tmp_path, object_mask(), exif=exif) == (
        "mask of the image before its EXIF turn: the mask is 40x30, the image 30x40, turned by its "
        "EXIF data. tools/prepare_data.py turns such masks with --turn-masks."
    )
    upright = object_mask().resize((30, 40))
    assert load(tmp_path, upright, exif=exif)[1].size == (30, 40)
    for size in ((30, 40), (40, 40), (40, 28)):
        message = reason(tmp_path, object_mask().resize(size))
        assert message.startswith(f"mask of another shape: the mask is {size[0]}x{size[1]}, ")
        assert "the image 40x30, expected sides in the same proportion" in message


@pytest.mark.parametrize(
    "mask_size, size, fits",
    [
        ((640, 480), (1024, 768), True),
        ((28, 28), (640, 640), True),
        ((28, 21), (640, 471), True),  # a pixel of the mask is 23 of the image
        ((102, 100), (1000, 1000), True),
        ((103, 100), (1000, 1000), False),
        ((100, 103), (1000, 1000), False),
        ((1, 1), (640, 480), True),
        ((480, 640), (640, 480), False),
    ],
)
def test_proportions_may_differ_by_two_per_cent_or_a_pixel(mask_size, size, fits):
    assert masks.same_shape(mask_size, size) == fits
