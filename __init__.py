"""CAT-Diffusion for ComfyUI: text-guided object inpainting with semantic pre-inpainting."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["comfy_entrypoint", "WEB_DIRECTORY"]
