"""What the host's own nodes do to a CONDITIONING."""

from . import symbols


def with_values(conditioning, values: dict):
    """A copy of the CONDITIONING in which every entry has these values."""
    return symbols.with_values(conditioning, values)


def stock_inpaint_conditioning(positive, negative, vae, image, mask, noise_mask: bool):
    """The host's InpaintModelConditioning, nodes.py:446 (InpaintModelConditioning): a grey hole.

    Takes its IMAGE (B, H, W, 3) and MASK (B, H, W); returns positive, negative and latent.
    """
    return symbols.run_stock_node(
        "InpaintModelConditioning",
        positive=positive,
        negative=negative,
        vae=vae,
        pixels=image,
        mask=mask,
        noise_mask=noise_mask,
    )
