"""The pack's own wire types and what every node does to its pictures and masks."""

import torch
from comfy_api.latest import io

CATEGORY = "CAT-Diffusion"
CatModelWire = io.Custom("CAT_MODEL")
VisualPromptWire = io.Custom("VISUAL_PROMPT")


def to_core(
    image: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The host's IMAGE (B, H, W, 3 or 4) and MASK (B, H, W) -> the core's (B, 3, H, W) and (B, 1, H, W).

    Alpha is dropped as the host does. One picture with N masks, or one mask with N pictures, is repeated.
    """
    if image.ndim != 4 or image.shape[3] not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"The image has shape {tuple(image.shape)}; expected (batch, height, width, 3). "
            "Connect an IMAGE, for example from Load Image."
        )
    image = image[..., :3].movedim(-1, 1).float().cpu()
    if not image.isfinite().all():
        raise ValueError(
            "The image contains NaN or Inf. The node before it failed; look at its output."
        )
    image = image.clamp(0, 1)
    if mask is None:
        return image, None
    if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1) or 0 in mask.shape:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}; expected (batch, height, width)."
        )
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    if not mask.isfinite().all():
        raise ValueError(
            "The mask contains NaN or Inf. The node before it failed; look at its output."
        )
    batch = max(len(image), len(mask))
    if not {len(image), len(mask)} <= {1, batch}:
        raise ValueError(
            f"There are {len(image)} images and {len(mask)} masks. "
            "Give as many masks as images, or one of either."
        )
    return image.expand(batch, -1, -1, -1), mask.clamp(0, 1).expand(batch, -1, -1, -1)
