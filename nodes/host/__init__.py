"""The one door to ComfyUI: nothing else in the pack imports comfy, folder_paths, server or comfy_extras."""
