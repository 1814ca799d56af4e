"""Pillow's pictures and arrays of 8-bit levels, as tensors in [0, 1] and back."""

from collections.abc import Iterable

import numpy as np
import torch
from einops import rearrange
from PIL import Image

WHITE = 255  # the highest level of 8 bits

Picture = Image.Image | np.ndarray  # an array holds uint8, (H, W) or (H, W, C)


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """0 to 255 of any type -> float32 in [0, 1], of the same shape and on the same device."""
    return levels.float() / WHITE


def to_levels(values: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> uint8 on the CPU, of the same shape: rounded; what is outside is clamped."""
    levels = values.detach().float().cpu().mul(WHITE)
    return levels.round().clamp(0, WHITE).to(torch.uint8)


def channels_first(picture: Picture) -> torch.Tensor:
    """A picture -> (1, C, H, W) float32 in [0, 1], as the networks take it.

    A grey picture has one channel.
    """
    levels = torch.from_numpy(np.array(picture))
    if levels.ndim == 2:
        levels = levels.unsqueeze(2)
    return from_levels(rearrange(levels, "h w c -> 1 c h w"))


def channels_last(pictures: Iterable[Picture]) -> torch.Tensor:
    """Pictures of one size -> (B, H, W, C) float32 in [0, 1]; grey ones -> (B, H, W).

    These are the shapes of ComfyUI's IMAGE and MASK.
    """
    levels = np.stack([np.asarray(picture) for picture in pictures])
    return from_levels(torch.from_numpy(levels))


def to_picture(image: torch.Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1], or (H, W) for a grey one -> a Pillow picture."""
    return Image.fromarray(to_levels(image).numpy())
