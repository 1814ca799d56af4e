"""The arrays that CAT-Diffusion's networks see, from pictures and masks of any size.

Follows the test branch of the official dataset class step by step: 8-bit pictures, Pillow's bicubic
resize to 512x512 without keeping the aspect ratio, from there to CLIP's 224x224, truncation after
the grey fill. Each of these choices changes the features if made otherwise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from PIL import Image

from .data.masks import HOLE_SIZE, MASKED
from .pictures.tensors import WHITE, from_levels, to_levels

SIZE = HOLE_SIZE  # pixels, the official working size
CLIP_SIZE = 224  # pixels
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
GREY = 127  # fill of the hole in what CLIP sees


@dataclass(frozen=True)
class ClipInput:
    """What CLIP and SemInpainter see."""

    image: torch.Tensor  # (B, 3, 224, 224) uint8, the whole picture: what a teacher sees
    masked_image: torch.Tensor  # (B, 3, 224, 224) uint8, the hole filled with grey
    patch_mask: torch.Tensor  # (B, 1, G, G) int64, 1 = any pixel of the patch is masked


def clip_input(
    image: torch.Tensor, mask: torch.Tensor | None = None, patch_size: int = 14
) -> ClipInput:
    """Prepare pictures for CLIP.

    Args:
        image: (B, 3, H, W) in [0, 1].
        mask: (B or 1, 1, H', W') in [0, 1], 1 = repaint, soft or hard; None means no hole.
        patch_size: side of CLIP's patches in pixels.
    """
    if mask is None:
        mask = image.new_zeros(1, 1, 1, 1)
    return _clip_input(_clip_sized(image), _clip_sized(mask), patch_size)


def clip_input_of_pictures(
    picture: Image.Image, hole: Image.Image, patch_size: int = 14
) -> ClipInput:
    """The same of Pillow's pictures, without a way through floats.

    Args:
        picture: RGB of any size.
        hole: L of any size, white = repaint.
    """
    return _clip_input(_clip_sized_picture(picture), _clip_sized_picture(hole), patch_size)


def _clip_input(image_224: np.ndarray, mask_224: np.ndarray, patch_size: int) -> ClipInput:
    """Fill the holes: (B, 224, 224, 3) and (B or 1, 224, 224, 1) uint8."""
    # In float64, and truncated, not rounded, as in the official code.
    hole = mask_224 / WHITE
    filled = image_224 * (1 - hole) + hole * GREY
    masked_image = _channels_first(filled.astype(np.uint8))

    hidden = mask_224.squeeze(3) >= MASKED
    cells = "b (row y) (column x) -> b 1 row column"
    patch_mask = reduce(hidden, cells, "max", y=patch_size, x=patch_size)

    batch = len(masked_image)
    return ClipInput(
        image=_channels_first(image_224).expand(batch, -1, -1, -1),
        masked_image=masked_image,
        patch_mask=torch.from_numpy(patch_mask).long().expand(batch, -1, -1, -1),
    )


def clip_normalise(image: torch.Tensor) -> torch.Tensor:
    """CLIP's pixel values: (B, 3, 224, 224) uint8 -> float32."""
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    return (from_levels(image) - mean) / std


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, H, W) in [0, 1] -> (B, C, height, width) uint8, by Pillow's bicubic filter."""
    return _channels_first(_resized(_channels_last(image), height, width))


def resize_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 1, H, W) in [0, 1] -> (B, 1, height, width) in [0, 1].

    Untouched if the size fits already, else in 8 bits.
    """
    if tuple(mask.shape[-2:]) == (height, width):
        return mask.float()
    return from_levels(resize(mask, height, width))


def latent_mask(
    mask: torch.Tensor, height: int, width: int, threshold: float = 0.5
) -> torch.Tensor:
    """The mask that the U-Net sees.

    A cell is masked above the threshold; the official training data uses 0.

    Args:
        mask: (B, 1, H, W) in [0, 1].
    Returns:
        (B, 1, height, width), exactly 0 or 1.
    """
    return (from_levels(resize(mask, height, width)) > threshold).float()


def vae_input(image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What CAT's VAE encodes: the hole faded to black by the soft mask.

    Args:
        image: (B, 3, H, W) in [0, 1].
        mask: (B or 1, 1, H, W) in [0, 1], 1 = repaint; None means no hole.
    Returns:
        (B, 3, H, W) float64 in [-1, 1], not rounded after 8 bits.
    """
    return vae_input_of_levels(to_levels(image), None if mask is None else to_levels(mask))


def vae_input_of_levels(image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The same of 8-bit levels, on the device where they are.

    Args:
        image: (B, 3, H, W) uint8.
        mask: (B or 1, 1, H, W) uint8, 255 = repaint; None means no hole.
    """
    levels = image.double()
    if mask is not None:
        levels = levels * (1 - mask.double() / WHITE)
    return levels / (WHITE / 2) - 1


# Between torch and Pillow -------------------------------------------------------------------------


def _channels_last(image: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, C) uint8."""
    return rearrange(to_levels(image), "b c h w -> b h w c").numpy()


def _channels_first(array: np.ndarray) -> torch.Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return rearrange(torch.from_numpy(array), "b h w c -> b c h w").contiguous()


def levels_of(picture: Image.Image, side: int | None = None) -> torch.Tensor:
    """A picture, RGB or L -> (C, side, side) uint8, by Pillow's bicubic filter.

    Args:
        side: None leaves the size as it is.
    """
    if side is not None and picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    array = np.array(picture)
    return _channels_first(array.reshape(1, *array.shape[:2], -1))[0]


def _clip_sized_picture(picture: Image.Image) -> np.ndarray:
    """RGB or L of any size -> (1, 224, 224, C) uint8, by way of the working size."""
    for side in (SIZE, CLIP_SIZE):
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.array(picture).reshape(1, CLIP_SIZE, CLIP_SIZE, -1)


def _clip_sized(image: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, 224, 224, C) uint8, by way of the working size."""
    levels = _resized(_channels_last(image), SIZE, SIZE)
    return _resized(levels, CLIP_SIZE, CLIP_SIZE)


def _resized(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, H, W, C) uint8 -> (B, height, width, C) uint8 by Pillow's bicubic filter, C 1 or 3."""
    batch, _, _, channels = levels.shape
    resized = np.empty((batch, height, width, channels), np.uint8)
    for number, array in enumerate(levels):
        if channels == 1:
            array = array.squeeze(2)  # Pillow's grey pictures have no axis for it
        picture = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
        resized[number] = np.asarray(picture).reshape(height, width, channels)
    return resized
