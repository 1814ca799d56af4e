"""The square around a hole, cut out of a photo for a model of one size, and put back into it.

What is not scaled keeps its pixels to the bit, and so does the photo outside of the hole.
"""

from dataclasses import dataclass

import torch
from scipy import ndimage
from torch.nn import functional as F

from .tensors import WHITE

# The host reads the white of a grey PNG as 254, so a black that was inverted may be 1.
ALMOST_BLACK = 1.5 / WHITE
ALMOST_WHITE = 1 - ALMOST_BLACK


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels; `right` and `bottom` are the first outside of it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def longer_side(self) -> int:
        return max(self.right - self.left, self.bottom - self.top)


@dataclass(frozen=True)
class Square:
    """A square of the photo; where the photo is narrower, it reaches beyond its edges."""

    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Crop:
    """Photos with their holes, and the square of each that a model gets."""

    photo: torch.Tensor  # (B, 3, H, W) in [0, 1]
    mask: torch.Tensor  # (B, 1, H, W) in [0, 1], 1 = repaint
    squares: tuple[Square, ...]  # one a photo

    def sized(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The squares as image (B, 3, size, size) and mask (B, 1, size, size), both in [0, 1].

        A square of this side is not scaled. Beyond the photo its edge pixels are repeated.
        """
        images = []
        masks = []
        for photo, mask, square in zip(self.photo, self.mask, self.squares, strict=True):
            images.append(scale_image(_cut(photo, square), size))
            masks.append(scale_mask(_cut(mask, square), size, size))
        return torch.stack(images), torch.stack(masks)


# Choosing the square --------------------------------------------------------------------------


def crop_around_mask(photo: torch.Tensor, mask: torch.Tensor, size: int, context: float) -> Crop:
    """Choose the square around the hole of each photo; all islands of a mask share one.

    Args:
        photo: (B, 3, H, W) in [0, 1].
        mask: (B, 1, H', W') in [0, 1], 1 = repaint; it is scaled to the photo. The square of an
            empty one is in the middle.
        size: pixels of the square that the model gets; smaller holes are not scaled up to it.
        context: how many times longer than the hole the square is, 1 or more.
    """
    height, width = photo.shape[2:]
    hole = scale_mask(mask, height, width)
    squares = []
    for plane in hole.squeeze(1):
        box = mask_box(plane) or _middle(height, width)
        squares.append(square_around(box, size, context, height, width))
    return Crop(photo, hole, tuple(squares))


def mask_box(mask: torch.Tensor) -> Box | None:
    """(H, W) in [0, 1] -> the box of all that is masked, None where nothing is."""
    masked = mask > ALMOST_BLACK
    if not masked.any():
        return None
    rows = masked.any(1).nonzero()
    columns = masked.any(0).nonzero()
    return Box(
        left=int(columns[0]),
        top=int(rows[0]),
        right=int(columns[-1]) + 1,
        bottom=int(rows[-1]) + 1,
    )


def square_around(box: Box, size: int, context: float, height: int, width: int) -> Square:
    """The square that shows a box of a photo to a model.

    It is `context` times as long as the box and no smaller than `size`. Where the photo is smaller
    than that, it is the largest square inside; where the box is longer still than the photo is
    wide, it is as long as the box. The box is in its middle, as far as the photo reaches.
    """
    side = max(size, box.longer_side, round(context * box.longer_side))
    shorter = min(height, width)
    if side > shorter:
        side = max(shorter, box.longer_side)
    return Square(
        left=_start(box.left, box.right, side, width),
        top=_start(box.top, box.bottom, side, height),
        side=side,
    )


def _start(first: int, last: int, side: int, length: int) -> int:
    """Where a square begins along one axis of the photo, which is `length` pixels long."""
    centred = (first + last - side) // 2
    lowest = min(0, length - side)
    highest = max(0, length - side)
    return min(max(centred, lowest), highest)


def _middle(height: int, width: int) -> Box:
    """The pixel in the middle of a photo."""
    left = width // 2
    top = height // 2
    return Box(left, top, left + 1, top + 1)


# Cutting and scaling --------------------------------------------------------------------------


def scale_image(image: torch.Tensor, side: int) -> torch.Tensor:
    """(C, H, W) in [0, 1] -> (C, side, side), bicubic and antialiased."""
    if tuple(image.shape[1:]) == (side, side):
        return image
    scaled = F.interpolate(image[None], (side, side), mode="bicubic", antialias=True)
    return scaled[0].clamp(0, 1)


def scale_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., H, W) in [0, 1] -> (..., height, width), outwards.

    Each pixel is the largest of those that it covers: what was masked stays so, and a mask of two
    values keeps them.
    """
    return F.adaptive_max_pool2d(mask, (height, width))


def _cut(picture: torch.Tensor, square: Square) -> torch.Tensor:
    """(C, H, W) -> (C, side, side)."""
    height, width = picture.shape[1:]
    rows = torch.arange(square.top, square.top + square.side).clamp(0, height - 1)
    columns = torch.arange(square.left, square.left + square.side).clamp(0, width - 1)
    return picture[:, rows[:, None], columns]


# Putting it back ------------------------------------------------------------------------------


def stitch(crop: Crop, drawn: torch.Tensor, soft_edge: int) -> torch.Tensor:
    """Put what a model made of the squares back into their photos.

    Args:
        drawn: (N, 3, h, w) in [0, 1] of any size, which is scaled to the squares. N is a multiple
            of the photos, which are repeated one after the other, as the host repeats latents.
        soft_edge: in this many pixels of the photo around the white of the mask one fades into
            the other.
    Returns:
        (N, 3, H, W) in [0, 1]: exactly the photo where the mask is 0 and no soft edge reaches,
        exactly what was drawn where the mask is 1, and a mixture where it is grey.
    """
    photos, _, height, width = crop.photo.shape
    stitched = crop.photo.repeat(len(drawn) // photos, 1, 1, 1)
    for number, square in enumerate(crop.squares):
        rows, rows_of_square = _overlap(square.top, square.side, height)
        columns, columns_of_square = _overlap(square.left, square.side, width)
        share = _share_of_drawn(crop.mask[number, 0], rows, columns, soft_edge)
        for variation in range(number, len(drawn), photos):
            whole = scale_image(drawn[variation], square.side)
            inside = whole[:, rows_of_square, columns_of_square]
            window = stitched[variation, :, rows, columns]
            # Unlike a weighted sum, lerp gives both ends to the bit.
            window.copy_(torch.lerp(window, inside, share))
    return stitched


def _overlap(start: int, side: int, length: int) -> tuple[slice, slice]:
    """What a square and the photo share along one axis, in the photo and in the square."""
    first = max(start, 0)
    last = min(start + side, length)
    return slice(first, last), slice(first - start, last - start)


def _share_of_drawn(
    mask: torch.Tensor, rows: slice, columns: slice, soft_edge: int
) -> torch.Tensor:
    """How much of what was drawn shows in a window of the photo: (H, W) -> (h, w) in [0, 1].

    The soft edge is narrower where the window ends in the midst of the photo: no seam is left
    there.
    """
    height, width = mask.shape
    window = mask[rows, columns]
    white = window > ALMOST_WHITE
    if soft_edge < 1 or not white.any():
        return window
    distance = torch.from_numpy(ndimage.distance_transform_edt(~white.numpy())).float()
    to_edge = torch.minimum(_to_edge(rows, height)[:, None], _to_edge(columns, width))
    reach = (distance + to_edge).clamp(max=soft_edge + 1)
    fading = (1 - distance / reach).masked_fill(distance > soft_edge, 0)
    return torch.maximum(window, fading)


def _to_edge(window: slice, length: int) -> torch.Tensor:
    """(n,) pixels from each of a window to the photo beyond it, infinite where it ends with it."""
    place = torch.arange(window.start, window.stop).float()
    before = place - window.start + 1
    after = window.stop - place
    if window.start == 0:
        before = before.fill_(torch.inf)
    if window.stop == length:
        after = after.fill_(torch.inf)
    return torch.minimum(before, after)
