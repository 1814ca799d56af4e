"""The two networks that CAT-Diffusion adds to Stable Diffusion."""
