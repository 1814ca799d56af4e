"""Patches of attention as well-known packs make them, small enough to be read here."""

import torch
from comfy.ldm.modules.attention import optimized_attention

from cat_diffusion.nodes.host import symbols

BLOCKS = [("input", 1), ("input", 3), ("middle", 1), ("output", 0), ("output", 3)]
WIDTHS = (32, 64)  # of the tiny U-Net's blocks


def image_prompt(model, strength=0.7):
    """As IP-adapters do: text attention replaced by itself plus attention onto image tokens."""
    generator = torch.Generator().manual_seed(5)
    keys = {width: torch.randn(1, 4, width, generator=generator) for width in WIDTHS}

    def replacement(q, k, v, extra_options):
        heads = extra_options["n_heads"]
        text = optimized_attention(q, k, v, heads)
        tokens = keys[q.shape[-1]].repeat(len(q), 1, 1)
        kinds = extra_options["cond_or_uncond"]
        looks = torch.tensor([kind == symbols.POSITIVE for kind in kinds]).float()
        rows = looks.repeat_interleave(len(q) // len(kinds)).view(-1, 1, 1)
        return text + strength * rows * optimized_attention(q, tokens, tokens, heads)

    patched = model.clone()
    for block in BLOCKS:
        patched.set_model_attn2_replace(replacement, *block)
    return patched


def reference_keys(model):
    """As reference-only control does: self-attention reads further keys and values."""

    def longer(q, k, v, extra_options):
        mirrored = v.flip(1) * 0.5
        return q, torch.cat((k, mirrored), dim=1), torch.cat((v, mirrored), dim=1)

    patched = model.clone()
    patched.set_model_attn1_patch(longer)
    return patched


def replaced_self_attention(model):
    """As perturbed or tiled attention do: self-attention replaced altogether."""

    def replacement(q, k, v, extra_options):
        return (v + optimized_attention(q, k, v, extra_options["n_heads"])) / 2

    patched = model.clone()
    for block in BLOCKS:
        patched.set_model_attn1_replace(replacement, *block)
    return patched


def more_text(model):
    """As prompt travel and regional prompts do: text attention reads changed keys and values."""

    def changed(q, k, v, extra_options):
        return q, torch.cat((k, k * 0.5), dim=1), torch.cat((v, v * 0.5), dim=1)

    patched = model.clone()
    patched.set_model_attn2_patch(changed)
    return patched


def scaled_middle(model):
    """As GLIGEN does: the place where the RefAdapter adds its own."""
    patched = model.clone()
    patched.set_model_patch(lambda x, extra_options: x * 0.9, symbols.MIDDLE_PATCH)
    return patched


def unet_wrapper(model):
    """As packs that tile or schedule do: the U-Net's call wrapped, its result changed."""

    def wrapper(apply_model, arguments):
        return 0.9 * apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched
