"""The official checkpoint's layout: which parts there are, and how their keys are spelled."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from ..config import Tensors

Stored = TypeVar("Stored")  # a tensor, or whatever stands for it

# Part -> its prefix in the official checkpoint. RefAdapter sits between the U-Net's own keys.
PREFIXES = {
    "sem_inpainter": "fusion_model.",
    "ref_adapter": "model.diffusion_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_text": "cond_stage_model.transformer.",
    "clip_vision": "cond_stage_model2.encoder.",
}
TITLES = {
    "sem_inpainter": "SemInpainter",
    "ref_adapter": "RefAdapter",
    "unet": "U-Net",
    "vae": "VAE",
    "clip_text": "CLIP text encoder",
    "clip_vision": "CLIP vision encoder",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What transformers 5 leaves out between a part's prefix and its layers.
_CLIP_LEVELS = {"clip_text": "text_model.", "clip_vision": "vision_model."}
_CLIP_PROJECTIONS = ("text_projection", "visual_projection")  # beside that level in every spelling

# Keys of the noise schedule: they hold no weights.
_SCHEDULE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
}


def describe(parts: Iterable[str]) -> str:
    """Titles of parts for messages, as in "SemInpainter, RefAdapter and VAE"."""
    parts = set(parts)
    titles = [TITLES[part] for part in PREFIXES if part in parts]
    if not titles:
        return "nothing of CAT-Diffusion"
    *others, last = titles
    return f"{', '.join(others)} and {last}" if others else last


def sort_keys(tensors: Mapping[str, Stored]) -> tuple[dict[str, dict[str, Stored]], list[str]]:
    """Sort a flat state dict into parts with canonical keys.

    Drops what is not a weight (schedule buffers, EMA copy, position_ids) and writes both spellings
    of the CLIP keys as Hugging Face's transformers 4 does, with `text_model.` and `vision_model.`.
    A CLIP vision file of its own, without the official prefix, is taken too.

    Returns:
        The parts, and the keys that fit nowhere.
    """
    parts: dict[str, dict[str, Stored]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if _is_no_weight(key):
            continue
        if key.startswith(("vision_model.", "visual_projection.")):
            key = PREFIXES["clip_vision"] + key
        part = _part_of(key)
        if part is None:
            unknown.append(key)
            continue
        name = key.removeprefix(PREFIXES[part])
        level = _CLIP_LEVELS.get(part)
        if level and not name.startswith((level, *_CLIP_PROJECTIONS)):
            name = level + name
        parts.setdefault(part, {})[name] = tensor
    return parts, unknown


def flat(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """Inverse of `sort_keys`: one state dict under the official prefixes."""
    tensors = {}
    for part, tensors_of_part in parts.items():
        for key, tensor in tensors_of_part.items():
            tensors[PREFIXES[part] + key] = tensor
    return tensors


def _is_no_weight(key: str) -> bool:
    return key in _SCHEDULE or key.startswith("model_ema.") or key.endswith(".position_ids")


def _part_of(key: str) -> str | None:
    """The part whose prefix a key has; None for a foreign key."""
    matching = (part for part, prefix in PREFIXES.items() if key.startswith(prefix))
    part = next(matching, None)
    # RefAdapter and U-Net share a prefix, and RefAdapter comes first.
    if part == "ref_adapter" and ".attn3." not in key and ".norm4." not in key:
        return "unet"
    return part
