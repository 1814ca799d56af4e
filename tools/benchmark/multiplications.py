"""Multiplications, counted on tensors without content, in units of 1e9."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_diffusion.nodes.host import measuring, symbols


def counted(function: Callable) -> float:
    """What a function multiplies: half the FLOP that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2e9


def step_multiplications(model, size: int, batch: int = 1) -> float:
    """Of one step with both rows of CFG; nothing is computed."""
    unet = measuring.unet_without_memory(model)
    meta = torch.device("meta")
    cells = size // 8
    rows = 2 * batch
    x = torch.empty(rows, unet.in_channels, cells, cells, device=meta)
    timesteps = torch.empty(rows, device=meta)
    text_width = symbols.model_config(model).unet_config["context_dim"]
    context = torch.empty(rows, 77, text_width, device=meta)
    # Order and numbers as the sampler has them: the negative prompt first (comfy/samplers.py:323).
    options = {
        "patches": {symbols.MIDDLE_PATCH: symbols.middle_patches(model)},
        "cond_or_uncond": [1, 0],
    }

    def step():
        unet(x, timesteps, context=context, transformer_options=options)

    return counted(step)
