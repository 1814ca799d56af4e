"""CAT-Diffusion for ComfyUI: text-guided object inpainting with semantic pre-inpainting."""

from .nodes.extension import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
