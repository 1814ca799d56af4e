"""The arrays that CAT-Diffusion's networks see, from pictures and masks of any size.

Follows the test branch of the official dataset class step by step: 8-bit pictures, Pillow's bicubic resize
to 512x512 without keeping the aspect ratio, from there to CLIP's 224x224, truncation after the grey fill.
Each of these choices changes the features if made otherwise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

SIZE = 512  # pixels, the official working size
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
    mask = image.new_zeros(1, 1, 1, 1) if mask is None else mask
    image_224, mask_224 = (
        _resize(_resize(_uint8(x), SIZE, SIZE), CLIP_SIZE, CLIP_SIZE) for x in (image, mask)
    )
    m = mask_224 / 255.0  # float64, as in the official code
    masked = (image_224 * (1 - m) + 1 * m * GREY).astype(np.uint8)  # truncated, not rounded
    side = CLIP_SIZE // patch_size
    cells = (mask_224[..., 0] >= 128).reshape(-1, side, patch_size, side, patch_size)
    patch_mask = torch.from_numpy(cells.any(axis=(2, 4)).astype(np.int64)).unsqueeze(1)
    batch = len(masked)
    return ClipInput(
        _tensor(image_224).expand(batch, -1, -1, -1),
        _tensor(masked),
        patch_mask.expand(batch, -1, -1, -1),
    )


def clip_normalise(image: torch.Tensor) -> torch.Tensor:
    """CLIP's pixel values: (B, 3, 224, 224) uint8 -> float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (image.float() / 255 - mean) / std


def resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, H, W) in [0, 1] -> (B, C, height, width) uint8, by Pillow's bicubic filter."""
    return _tensor(_resize(_uint8(x), height, width))


def resize_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 1, H, W) in [0, 1] -> (B, 1, height, width) in [0, 1]; untouched if the size fits already."""
    return (
        mask.float()
        if tuple(mask.shape[-2:]) == (height, width)
        else resize(mask, height, width).float() / 255
    )


def latent_mask(
    mask: torch.Tensor, height: int, width: int, threshold: float = 0.5
) -> torch.Tensor:
    """The mask that the U-Net sees: (B, 1, H, W) in [0, 1] -> (B, 1, height, width), exactly 0 or 1.

    A cell is masked above the threshold; the official training data uses 0.
    """
    return (resize(mask, height, width) / 255.0 > threshold).float()


def vae_input(image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What CAT's VAE encodes: the hole faded to black by the soft mask.

    (B, 3, H, W) and (B or 1, 1, H, W), both in [0, 1] -> (B, 3, H, W) float64 in [-1, 1], no rounding after 8 bits.
    """
    image = _uint8(image)
    m = 0.0 if mask is None else _uint8(mask) / 255.0
    return _tensor(image * (1 - m) / 127.5 - 1)


def _uint8(x: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, C) uint8."""
    return (
        x.detach()
        .float()
        .cpu()
        .mul(255)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .numpy()
    )


def _tensor(arrays: np.ndarray) -> torch.Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _resize(arrays: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, H, W, 1 or 3) uint8 -> (B, height, width, 1 or 3) uint8 by Pillow's bicubic filter."""
    pictures = [
        Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays
    ]
    resized = np.stack(
        [
            np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
            for picture in pictures
        ]
    )
    return resized.reshape(len(arrays), height, width, -1)
