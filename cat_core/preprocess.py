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


def clip_input(image: torch.Tensor, mask: torch.Tensor | None = None, patch_size: int = 14) -> ClipInput:
    """Prepare pictures for CLIP.

    Args:
        image: (B, 3, H, W) in [0, 1].
        mask: (B or 1, 1, H', W') in [0, 1], 1 = repaint, soft or hard; None means no hole.
        patch_size: side of CLIP's patches in pixels.
    """
    batch = max(image.shape[0], 1 if mask is None else mask.shape[0])
    image_224 = np.stack([_resize(_resize(array, SIZE, SIZE), CLIP_SIZE, CLIP_SIZE) for array in _uint8(image)])
    if mask is None:
        mask_224 = np.zeros((1, CLIP_SIZE, CLIP_SIZE, 1), np.uint8)
    else:
        mask_224 = np.stack([_resize(_resize(array, SIZE, SIZE), CLIP_SIZE, CLIP_SIZE) for array in _uint8(mask)])
    m = mask_224 / 255.0  # float64, as in the official code
    masked = (image_224 * (1 - m) + 1 * m * GREY).astype(np.uint8)  # truncated, not rounded
    side = CLIP_SIZE // patch_size
    cells = (mask_224[..., 0] >= 128).reshape(-1, side, patch_size, side, patch_size)
    patch_mask = torch.from_numpy(cells.any(axis=(2, 4)).astype(np.int64)).unsqueeze(1)
    return ClipInput(*(_expand(t, batch) for t in (_tensor(image_224), _tensor(masked), patch_mask)))


def clip_normalise(image: torch.Tensor) -> torch.Tensor:
    """CLIP's pixel values: (B, 3, 224, 224) uint8 -> float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (image.float() / 255 - mean) / std


def resize_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 1, H, W) in [0, 1] -> (B, 1, height, width) float32, bicubic over 8 bits; unchanged if the size fits."""
    if tuple(mask.shape[-2:]) == (height, width):
        return mask.float()
    return _tensor(np.stack([_resize(array, height, width) for array in _uint8(mask)])).float() / 255


def latent_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The mask that the U-Net sees: (B, 1, H, W) in [0, 1] -> (B, 1, height, width), exactly 0 or 1."""
    return (_tensor(np.stack([_resize(array, height, width) for array in _uint8(mask)])) / 255.0 > 0.5).float()


def fill_black(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """CAT's VAE input: (B, 3, H, W) and (B, 1, H, W), both in [0, 1] -> the hole faded to 0, the mask kept soft."""
    return image * (1 - mask)


def fill_grey(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Stable Diffusion Inpainting's VAE input: the mask rounded, the hole set to 0.5."""
    return (image - 0.5) * (1 - mask.round()) + 0.5


def _uint8(x: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, C) uint8."""
    return x.detach().float().cpu().mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _tensor(arrays: np.ndarray) -> torch.Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) uint8 -> (height, width, C) uint8 by Pillow's bicubic filter."""
    picture = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return resized[..., None] if resized.ndim == 2 else resized


def _expand(x: torch.Tensor, batch: int) -> torch.Tensor:
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x
