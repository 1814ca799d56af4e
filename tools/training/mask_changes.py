"""Masks of a data set that are drawn anew, since training would not take them as they are."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image, ImageChops, ImageOps

from cat_diffusion.cat_core.data import masks
from cat_diffusion.cat_core.data.folder import Candidate, DataFolder
from cat_diffusion.cat_core.data.manifest import Box, Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.errors import few
from cat_diffusion.cat_core.pictures import opening

HIGHEST = 65535  # value of a mask

Draw = Callable[[], Image.Image]


@dataclass(frozen=True)
class MaskChanges:
    """What the command was told about a data set's masks.

    Args:
        values: that mean the object; None means white.
        turn: whether masks and boxes are drawn on the images as they are stored, before their EXIF
            data turns them.
    """

    values: frozenset[int] | None = None
    turn: bool = False

    def __bool__(self) -> bool:
        return self.values is not None or self.turn

    def apply(
        self, candidates: Iterable[Candidate], folder: Path, drawn: DataFolder
    ) -> Iterator[Candidate]:
        """The same samples with masks that training takes, drawn where that is needed.

        Args:
            folder: the manifest's.
            drawn: where the new masks go.
        """
        for candidate in candidates:
            if candidate.record is not None and candidate.record.hole:
                candidate = self._changed(candidate, candidate.record, folder, drawn)
            yield candidate

    def _changed(
        self, candidate: Candidate, record: Record, folder: Path, drawn: DataFolder
    ) -> Candidate:
        draw = candidate.draw
        if draw is None and record.mask is not None:
            path = folder / record.mask
            if self.values is not None:
                draw = partial(mask_of_values, path, self.values)
            else:
                draw = partial(masks.read_mask, path)
        orientation = _orientation(folder / record.image) if self.turn else 1
        if self.values is None and orientation == 1:
            return candidate
        if orientation != 1 and record.box is not None:
            record = replace(record, box=turned_box(record.box, orientation))
        if draw is None:
            return candidate._replace(record=record)
        if candidate.draw is None:
            record = replace(record, mask=drawn.inside(f"{record.mask}.png"))
        if orientation != 1:
            draw = partial(_turned_mask, draw, orientation, folder / record.image)
        return candidate._replace(record=record, draw=draw)


def mask_of_values(path: Path, values: frozenset[int]) -> Image.Image:
    """A mask picture with several values -> L, 255 where it has one of `values`.

    A palette's values are its places. Raises SampleError.
    """
    with masks.opened(path, "mask") as file:
        stored = _one_value_a_pixel(ImageOps.exif_transpose(file), path).convert("I")
    table = [255 * (value in values) for value in range(HIGHEST + 1)]
    mask = stored.point(table, "L")
    if mask.getbbox() is None:
        held = [str(value) for _, value in stored.getcolors(HIGHEST + 1) or []]
        raise SampleError("none of --mask-values", f"{path} holds {few(held)}")
    return mask


def turned_box(box: Box, orientation: int) -> Box:
    """A box on a picture as it is stored -> the same box on the upright picture."""
    x0, y0, x1, y1 = box
    if orientation in (5, 6, 7, 8):
        x0, y0, x1, y1 = y0, x0, y1, x1
    if orientation in (2, 3, 6, 7):
        x0, x1 = 1 - x1, 1 - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = 1 - y1, 1 - y0
    return x0, y0, x1, y1


def _turned_mask(draw: Draw, orientation: int, image: Path) -> Image.Image:
    """A mask drawn on the stored image, turned as that is; raises SampleError unless it fits."""
    mask = opening.turned(draw(), orientation)
    with masks.opened(image, "image") as file:
        masks.check_shape(mask, opening.upright_size(file), turned=False)
    return mask


def _orientation(image: Path) -> int:
    """How an image is stored; 1 where it cannot be opened, which is told later."""
    try:
        with masks.opened(image, "image") as file:
            return opening.orientation(file)
    except SampleError:
        return 1


def _one_value_a_pixel(mask: Image.Image, path: Path) -> Image.Image:
    """The values of a mask as grey levels; raises SampleError where it has several channels."""
    if mask.mode == "P":
        return Image.frombytes("L", mask.size, mask.tobytes())
    if mask.mode == "1":
        return mask.convert("L").point([0] + [1] * 255)
    if mask.mode == "L" or mask.mode.startswith("I"):
        return mask
    red, green, blue = mask.convert("RGB").split()
    for channel in (green, blue):
        if ImageChops.difference(red, channel).getbbox() is not None:
            raise SampleError("mask in colours", f"{path} is {mask.mode}, --mask-values wants grey")
    return red
