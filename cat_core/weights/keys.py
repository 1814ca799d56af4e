"""The official checkpoint's layout: which parts there are, and how their keys are spelled."""

from collections.abc import Iterable, Mapping

import torch

from ..config import Tensors

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

# Keys that hold no weights: the noise schedule, an EMA copy, constant indices, logit buffers.
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
    """ "SemInpainter and RefAdapter", for messages."""
    parts = set(parts)
    titles = [TITLES[part] for part in PREFIXES if part in parts]
    return (
        " and ".join(filter(None, (", ".join(titles[:-1]), titles[-1])))
        if titles
        else "nothing of CAT-Diffusion"
    )


def sort_keys(tensors: Tensors) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """Sort a flat state dict into parts with canonical keys; also return the keys that fit nowhere.

    Drops what is not a weight (schedule buffers, EMA copy, position_ids) and writes both spellings of the CLIP
    keys as Hugging Face's transformers 4 does, with `text_model.` and `vision_model.`. A CLIP vision file of its own,
    without the official prefix, is taken too.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if key in _SCHEDULE or key.startswith("model_ema.") or key.endswith(".position_ids"):
            continue
        if key.startswith(("vision_model.", "visual_projection.")):
            key = PREFIXES["clip_vision"] + key
        part = next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)
        if part is None:
            unknown.append(key)
            continue
        name = key.removeprefix(PREFIXES[part])
        if part == "ref_adapter" and ".attn3." not in name and ".norm4." not in name:
            part = "unet"
        for clip, level in (("clip_text", "text_model."), ("clip_vision", "vision_model.")):
            if part == clip and not name.startswith(
                (level, "text_projection", "visual_projection")
            ):
                name = level + name
        parts.setdefault(part, {})[name] = tensor
    return parts, unknown


def flat(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """Inverse of `sort_keys`: one state dict under the official prefixes."""
    return {
        PREFIXES[part] + key: tensor
        for part, tensors in parts.items()
        for key, tensor in tensors.items()
    }


def few(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
