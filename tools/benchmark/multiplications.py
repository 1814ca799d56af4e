"""Multiplications, counted on tensors without content, in units of 1e9."""

from collections.abc import Callable

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
    x, timesteps, context = measuring.unet_inputs_without_memory(model, 2 * batch, size // 8)
    # In the sampler's order: the negative prompt first.
    options = symbols.sampler_options(model, [symbols.NEGATIVE, symbols.POSITIVE])

    def step():
        symbols.call_unet(unet, x, timesteps, context, options)

    return counted(step)
