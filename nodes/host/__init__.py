"""The one door to ComfyUI.

Nothing else in the pack imports comfy, comfy_extras, folder_paths, node_helpers, server or the
host's own nodes. What the host does not document is reached through symbols.py alone.
"""
