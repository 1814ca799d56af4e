"""ComfyUI: installed for the tools, started for them, and spoken to over HTTP.

Whoever imports this has the checkout as the package `cat_diffusion`, whatever its folder is called.
Nothing of the package runs before a part of it is imported.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "cat_diffusion" not in sys.modules:
    sys.modules["cat_diffusion"] = types.ModuleType("cat_diffusion")
    sys.modules["cat_diffusion"].__path__ = [str(ROOT)]
