"""Training CAT-Diffusion: what a run reads, minimises and writes. Never imports ComfyUI."""
