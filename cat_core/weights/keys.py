"""The official checkpoint's layout: which parts there are, and how their keys are spelled."""

import re
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
# Beside the official parts: a LoRA, under the prefix that ComfyUI's own loader knows.
ADDED_PREFIXES = {"unet_lora": "diffusion_model."}
_ALL_PREFIXES = {**PREFIXES, **ADDED_PREFIXES}
TITLES = {
    "sem_inpainter": "SemInpainter",
    "ref_adapter": "RefAdapter",
    "unet": "U-Net",
    "vae": "VAE",
    "clip_text": "CLIP text encoder",
    "clip_vision": "CLIP vision encoder",
    "unet_lora": "U-Net's LoRA",
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

# What programs put before all keys: DDP around a model, torch.compile inside one.
_WRAPPING = re.compile(r"^(module\.)+|_orig_mod\.")
# What training and merging leave beside the weights.
_LEFT_OVER = re.compile(
    r"(^|\.)(model_ema|embedding_manager|denoiser|loss_fn)\."
    r"|^first_stage_model\.loss\."
    r"|(^|\.)(logit_scale|scale_factor|sigmas|log_sigmas|ztsnr|v_pred|global_step|epoch)$"
)


def describe(parts: Iterable[str]) -> str:
    """Titles of parts for messages, as in "SemInpainter, RefAdapter and VAE"."""
    parts = set(parts)
    titles = [TITLES[part] for part in TITLES if part in parts]
    if not titles:
        return "nothing of CAT-Diffusion"
    *others, last = titles
    return f"{', '.join(others)} and {last}" if others else last


def sort_keys(tensors: Mapping[str, Stored]) -> tuple[dict[str, dict[str, Stored]], list[str]]:
    """Sort a flat state dict into parts with canonical keys.

    Drops what is not a weight (schedule buffers, EMA copy, position_ids and what `left_over` names)
    and writes both spellings of the CLIP keys as Hugging Face's transformers 4 does, with
    `text_model.` and `vision_model.`. Prefixes of DDP and torch.compile go. A CLIP vision file of
    its own, without the official prefix, is taken too.

    Returns:
        The parts, and the keys that fit nowhere or name a weight a second time.
    """
    parts: dict[str, dict[str, Stored]] = {}
    unknown = []
    for stored_key, tensor in tensors.items():
        key = _unwrapped(stored_key)
        if _is_of_the_schedule(key) or _LEFT_OVER.search(key):
            continue
        part = _part_of(key)
        if part is None:
            unknown.append(stored_key)
            continue
        name = key.removeprefix(_ALL_PREFIXES[part])
        level = _CLIP_LEVELS.get(part)
        if level and not name.startswith((level, *_CLIP_PROJECTIONS)):
            name = level + name
        if name in parts.setdefault(part, {}):
            unknown.append(stored_key)
            continue
        parts[part][name] = tensor
    return parts, unknown


def left_over(keys: Iterable[str]) -> list[str]:
    """Those keys that training or merging left beside the weights; `sort_keys` drops them."""
    return [key for key in keys if _LEFT_OVER.search(_unwrapped(key))]


def is_of_a_part(key: str) -> bool:
    """Whether a weight of some part is to be under this key."""
    key = _unwrapped(key)
    if _is_of_the_schedule(key) or _LEFT_OVER.search(key):
        return False
    return _part_of(key) is not None


def flat(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """Inverse of `sort_keys`: one state dict under the official prefixes."""
    tensors = {}
    for part, tensors_of_part in parts.items():
        for key, tensor in tensors_of_part.items():
            tensors[_ALL_PREFIXES[part] + key] = tensor
    return tensors


def _unwrapped(key: str) -> str:
    """A key in the official spelling."""
    key = _WRAPPING.sub("", key)
    if key.startswith(("vision_model.", "visual_projection.")):
        return PREFIXES["clip_vision"] + key
    return key


def _is_of_the_schedule(key: str) -> bool:
    """Whether a key is of a buffer that every checkpoint has beside its weights."""
    return key in _SCHEDULE or key.endswith(".position_ids")


def _part_of(key: str) -> str | None:
    """The part whose prefix a key has; None for a foreign key."""
    matching = (part for part, prefix in _ALL_PREFIXES.items() if key.startswith(prefix))
    part = next(matching, None)
    if part == "unet_lora" and ".lora_" not in key:
        return None  # a U-Net without its official prefix
    # RefAdapter and U-Net share a prefix, and RefAdapter comes first.
    if part == "ref_adapter" and ".attn3." not in key and ".norm4." not in key:
        return "unet"
    return part
