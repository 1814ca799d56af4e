"""ComfyUI's dynamic VRAM, turned on by hand on a CPU: `--dynamic-vram`.

ComfyUI turns it on by itself on a GPU: its own reader of files, its layers without weights and its
ModelPatcherDynamic. What needs a GPU is left out: the address space that weights are paged into;
they are computed with from the mapped file instead.
"""

import sys
from contextlib import contextmanager

import pytest
from paths import COMFYUI


def turn_on() -> None:
    """Before anything else of ComfyUI is imported, as its main.py does (main.py:278)."""
    if sys.platform == "darwin":
        pytest.exit("ComfyUI has no dynamic VRAM on a Mac.", returncode=0)
    # Late, one after the other: each reads at its import what was set before it.
    import comfy_aimdo.control

    assert comfy_aimdo.control.init()
    sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True  # as launch.start_host does on a CPU
    import comfy.memory_management
    import comfy.model_patcher

    class OnCPU(comfy.model_patcher.ModelPatcherDynamic):
        def __new__(cls, *args, **kwargs):
            return object.__new__(cls)  # the host's own would be an ordinary ModelPatcher for a CPU

        def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
            return self.restore_loaded_backups()

    comfy.model_patcher.CoreModelPatcher = OnCPU
    comfy.memory_management.aimdo_enabled = True


@contextmanager
def ordinary_layers():
    """For what makes weights itself, as tools do, which run without dynamic VRAM."""
    memory_management = sys.modules.get("comfy.memory_management")
    if not getattr(memory_management, "aimdo_enabled", False):
        yield
        return
    memory_management.aimdo_enabled = False
    try:
        yield
    finally:
        memory_management.aimdo_enabled = True
