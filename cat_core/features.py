"""From CLIP's outputs to the visual prompt that the RefAdapters read."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class VisualPrompt:
    """A visual prompt and what it was made from, for previews, comparison and training.

    `before` and `after` are equal where no SemInpainter ran.
    """

    tokens: torch.Tensor  # (B, G*G/4, D), pooled, row-major
    before: torch.Tensor  # (B, G*G, D), CLIP's patch features of the picture that was seen
    after: torch.Tensor  # (B, G*G, D), with the hole's features replaced by the predicted ones
    patch_mask: torch.Tensor  # (B, 1, G, G), 1 = patch was repainted
    picture: torch.Tensor  # (B, 3, 224, 224) uint8, what CLIP saw
    mask: torch.Tensor | None = None  # (B, 1, H, W) in [0, 1], 1 = hidden from CLIP
    text: str = ""  # of the last object
    image_feature: torch.Tensor | None = None  # (B, D), predicted; None where no SemInpainter ran


def blend(
    predicted: torch.Tensor, observed: torch.Tensor, patch_mask: torch.Tensor
) -> torch.Tensor:
    """Predicted features inside the hole, observed ones outside.

    (B, N, D) x 2, (B, 1, G, G) -> (B, N, D).
    """
    m = patch_mask.flatten(1).unsqueeze(2).to(predicted)  # (B, N, 1)
    return m * predicted + (1 - m) * observed


def pool(patches: torch.Tensor) -> torch.Tensor:
    """2x2 average over the patch grid: (B, G*G, D) -> (B, G*G/4, D), row-major."""
    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, D, G, G)
    return nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)


def masked_cosine(patches: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity over masked patches: (B, N, D) x 2, (B, N) -> (B,).

    NaN for rows without a mask.
    """
    cosine = nn.functional.cosine_similarity(patches, teacher, dim=2)  # (B, N)
    return (cosine * mask).sum(1) / mask.sum(1)
