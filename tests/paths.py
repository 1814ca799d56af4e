"""Where things lie, for tests."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(__file__).parent / "goldens"
COMFYUI = Path(os.environ["CAT_DIFFUSION_COMFYUI"])  # set by tools/test.py
