"""The ComfyUI nodes, a file a feature; extension.py lists them for the host."""
