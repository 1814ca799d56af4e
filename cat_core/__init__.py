"""CAT-Diffusion in pure PyTorch: SemInpainter, RefAdapter and what they need.

Never imports ComfyUI. Shapes are written in one alphabet everywhere:
B batch, N tokens, D width of the visual features, T width of the text features,
C width of a U-Net block, P visual prompts, M tokens of one, H W pixels, h w latent cells,
G patches along one side of the CLIP grid (16).
Images are (B, 3, H, W) in [0, 1], masks (B, 1, H, W) in [0, 1] with 1 = repaint.
"""
