"""A picture for the demo model, so that its workflow runs as it is dropped onto the canvas."""

from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from .wires import CATEGORY

FOLDER = Path(__file__).resolve().parents[1] / "web/scenes"  # the canvas shows them too


class CATDemoScene(io.ComfyNode):
    """One of the drawn scenes that come with the pack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATDemoScene",
            display_name="CAT Demo Scene",
            category=f"{CATEGORY}/loaders",
            search_aliases=["example picture", "demo image", "test scene", "示例图片"],
            description="A drawn picture with a hole, made for the small demo model, which knows coloured shapes only. For your "
            "own pictures use Load Image.",
            inputs=[
                io.Combo.Input(
                    "scene",
                    options=sorted(path.stem for path in FOLDER.glob("*.png")),
                    tooltip="A picture and its hole.",
                )
            ],
            outputs=[
                io.Image.Output(tooltip="The picture, 128x128."),
                io.Mask.Output(tooltip="Its hole, white where the object goes."),
            ],
        )

    @classmethod
    def execute(cls, scene) -> io.NodeOutput:
        with Image.open(FOLDER / f"{scene}.png") as file:
            picture = torch.from_numpy(
                np.array(file.convert("RGBA"), np.float32) / 255
            )  # (H, W, 4)
        return io.NodeOutput(picture[None, ..., :3], 1 - picture[None, ..., 3])
