"""The pack's own wire types and what every node does to its pictures and masks."""

import torch
from comfy_api.latest import io

from .checks import shown

CATEGORY = "CAT-Diffusion"
CatModelWire = io.Custom("CAT_MODEL")
CropWire = io.Custom("CAT_CROP")
VisualPromptWire = io.Custom("VISUAL_PROMPT")


def to_core(
    image: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The host's IMAGE (B, H, W, 3 or 4) and MASK (B, H, W) -> (B, 3, H, W) and (B, 1, H, W).

    fp32 on the CPU, in [0, 1]; mask 1 = repaint. Alpha is dropped as the host does. One picture
    with N masks, or one mask with N pictures, is repeated. A mask of black and white alone is
    exactly 0 and 1, also where it was decoded one level off.
    """
    core_image = _core_image(image)
    if mask is None:
        return core_image, None
    core_mask = _core_mask(mask)
    batch = common_batch(
        len(core_image),
        len(core_mask),
        f"There are {len(core_image)} images and {len(core_mask)} masks. "
        "Give as many masks as images, or one of either.",
    )
    return core_image.expand(batch, -1, -1, -1), core_mask.expand(batch, -1, -1, -1)


def common_batch(first: int, second: int, refusal: str) -> int:
    """The size of both batches where they agree or one of them is 1; else raise ValueError."""
    if first != second and 1 not in (first, second):
        raise ValueError(refusal)
    return max(first, second)


def _core_image(image: torch.Tensor) -> torch.Tensor:
    if not isinstance(image, torch.Tensor):
        raise ValueError(
            f"The image is {shown(image)}; expected an IMAGE. "
            "Connect one, for example from Load Image."
        )
    if image.ndim != 4 or image.shape[3] not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"The image has shape {tuple(image.shape)}; expected (batch, height, width, 3). "
            "Connect an IMAGE, for example from Load Image."
        )
    if not image.is_floating_point():
        raise ValueError(
            f"The image holds numbers of type {image.dtype}; expected fractions from 0 to 1. "
            "The node before it makes no IMAGE; use another one."
        )
    core_image = image[..., :3].movedim(-1, 1).float().cpu()
    if not core_image.isfinite().all():
        raise ValueError(
            "The image contains NaN or Inf. The node before it failed; look at its output."
        )
    return core_image.clamp(0, 1)


def _core_mask(mask: torch.Tensor) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"The mask is {shown(mask)}; expected a MASK. Connect one, for example from Load Image."
        )
    has_channels = mask.ndim == 4 and mask.shape[1] != 1
    if mask.ndim not in (2, 3, 4) or has_channels or 0 in mask.shape:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}; expected (batch, height, width). "
            "Connect a MASK, for example from Load Image."
        )
    if mask.is_complex():
        raise ValueError(
            f"The mask holds numbers of type {mask.dtype}; expected fractions from 0 to 1. "
            "The node before it makes no MASK; use another one."
        )
    core_mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
    if not core_mask.isfinite().all():
        raise ValueError(
            "The mask contains NaN or Inf. The node before it failed; look at its output."
        )
    return _as_drawn(core_mask.clamp(0, 1))


def _as_drawn(mask: torch.Tensor) -> torch.Tensor:
    """Masks (B, 1, H, W) with those of black and white alone at exactly 0 and 1.

    The host reads white of an 8-bit grey PNG as 254.008 of 255, by PyAV, and what is inverted has
    a black of 0.992 then. A trace of what is under the mask would be left in the hole. Masks with
    anything in between stay as they are.
    """
    level = 1 / 255 + 1e-6  # a little more, for what rounding adds
    is_plain = ((mask <= level) | (mask >= 1 - level)).flatten(1).all(dim=1)
    return torch.where(is_plain.view(-1, 1, 1, 1), mask.round(), mask)
