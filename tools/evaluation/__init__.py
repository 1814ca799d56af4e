"""Finished pictures: made by servers for every sample of a manifest, and measured."""

from comfyui import ROOT

DEMO_MODEL = ROOT / "models/cat_demo_model.safetensors"
