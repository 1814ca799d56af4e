"""Pictures made through a running ComfyUI, and what they are worth."""
