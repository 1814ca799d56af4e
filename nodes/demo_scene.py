"""A picture for the demo model, so that its workflow runs as it is dropped onto the canvas."""

from pathlib import Path

from comfy_api.latest import io
from PIL import Image

from ..cat_core.pictures.tensors import channels_last
from .checks import check_choice
from .wires import CATEGORY

FOLDER = Path(__file__).resolve().parents[1] / "web/scenes"  # the canvas shows them too


def _scenes() -> list[str]:
    """The names of the drawn pictures."""
    return sorted(path.stem for path in FOLDER.glob("*.png"))


class CATDemoScene(io.ComfyNode):
    """One of the drawn scenes that come with the pack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATDemoScene",
            display_name="CAT Demo Scene",
            category=f"{CATEGORY}/loaders",
            search_aliases=["example picture", "demo image", "test scene", "示例图片"],
            description="A drawn picture with a hole, made for the small demo model, which knows "
            "coloured shapes only. For your own pictures use Load Image.",
            inputs=[
                io.Combo.Input(
                    "scene",
                    options=_scenes(),
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
        check_choice("scene", scene, _scenes())
        with Image.open(FOLDER / f"{scene}.png") as file:
            scene_rgba = channels_last([file.convert("RGBA")])  # (1, H, W, 4)
        image = scene_rgba[..., :3]
        mask = 1 - scene_rgba[..., 3]  # the hole is where the picture is transparent
        return io.NodeOutput(image, mask)
