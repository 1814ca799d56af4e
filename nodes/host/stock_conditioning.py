"""What the host's own nodes do to a CONDITIONING."""

import node_helpers

import nodes


def with_values(conditioning, values: dict):
    """A copy of the CONDITIONING in which every entry has these values."""
    return node_helpers.conditioning_set_values(conditioning, values)


def stock_inpaint_conditioning(positive, negative, vae, image, mask, noise_mask: bool):
    """The host's InpaintModelConditioning, which fills the hole grey (its nodes.py:446).

    Takes its IMAGE (B, H, W, 3) and MASK (B, H, W); returns positive, negative and latent.
    """
    return nodes.InpaintModelConditioning().encode(positive, negative, image, vae, mask, noise_mask)
