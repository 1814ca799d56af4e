"""A photograph with a mask, so that workflows for photographs run before one chooses a photo."""

import os
from pathlib import Path

from comfy_api.latest import io
from PIL import Image, ImageOps

from .checks import odd_name
from .host import sample_files
from .wires import CATEGORY

FOLDER = Path(__file__).resolve().parents[1] / "web/photograph"
FILE = "cat_sample_photo.png"
SAMPLE = f"{FILE} [temp]"  # as the host's loaders name a file of that folder


def sample_picture() -> Image.Image:
    """The photograph, transparent where its mask is, as the mask editor saves pictures."""
    with Image.open(FOLDER / "photo.jpg") as file:
        photograph = file.convert("RGB")
    with Image.open(FOLDER / "mask.png") as file:
        photograph.putalpha(ImageOps.invert(file.convert("L")))
    return photograph


def lay_out_sample() -> None:
    """Put the sample where the page can show it."""
    sample_files.lay_out(FILE, sample_picture())


def _path(image: str) -> str:
    """Where the picture lies; "" if it is nowhere. The sample is laid out again if it is gone."""
    path = sample_files.path_of(image)
    if not path and image == SAMPLE:
        lay_out_sample()
        path = sample_files.path_of(image)
    return path


def _absence(image) -> str | None:
    """A sentence about a name that is none, or whose file is not there; or None."""
    sentence = odd_name("image", image)
    if sentence is None and not _path(image):
        sentence = f"There is no picture {image}. Upload it again, or choose {SAMPLE}."
    return sentence


class CATSamplePhoto(io.ComfyNode):
    """A photograph with a mask that come with the pack, and any other that one uploads."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATSamplePhoto",
            display_name="CAT Sample Photo",
            category=f"{CATEGORY}/loaders",
            search_aliases=["example photo", "test photo", "sample image", "示例照片"],
            description="A photograph with a mask, to try a workflow with. Upload your own in its "
            "place, or paint another mask: it works like Load Image.",
            inputs=[
                io.Combo.Input(
                    "image",
                    options=[SAMPLE],
                    upload=io.UploadType.image,
                    tooltip="The sample with a mask for a spoon, or a picture of yours. To paint "
                    "another mask, right-click it and choose the mask editor.",
                )
            ],
            outputs=[
                io.Image.Output(tooltip="The photo."),
                io.Mask.Output(tooltip="Its mask, white where the object goes."),
            ],
        )

    @classmethod
    def validate_inputs(cls, image):
        # None where another node supplies it.
        return image is None or _absence(image) or True

    @classmethod
    def fingerprint_inputs(cls, image):
        path = _path(image) if isinstance(image, str) else ""
        if not path or image == SAMPLE:
            return image
        status = os.stat(path)
        return path, status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, image) -> io.NodeOutput:
        sentence = _absence(image)
        if sentence:
            raise ValueError(sentence)
        return io.NodeOutput(*sample_files.load_picture(image))
