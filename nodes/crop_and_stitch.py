"""A part of a large photo for a model that knows one size, and the way back into the photo."""

from comfy_api.latest import io

from ..cat_core.pictures.crop import Crop, crop_around_mask, mask_box, stitch
from .checks import check_number, check_wires
from .host.messages import say, sentence
from .wires import CATEGORY, CropWire, to_core

CELL = 8  # pixels that the VAE makes one latent of; it would cut off the rest
LARGEST = 2048  # pixels of a square's side
MOST_CONTEXT = 8.0
WIDEST_EDGE = 256  # pixels


class CATCropAroundMask(io.ComfyNode):
    """The square around the hole, in the size that the model was trained for."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATCropAroundMask",
            display_name="CAT Crop Around Mask",
            category=CATEGORY,
            search_aliases=[
                "inpaint crop",
                "crop and stitch",
                "only masked",
                "zoom to mask",
                "按遮罩裁剪",
                "局部裁剪",
            ],
            description="Cut a square around the mask out of a photo of any size, so that the "
            "model draws at the size it was trained for. CAT Stitch puts the result back.",
            inputs=[
                io.Image.Input("image", tooltip="The photo, of any size."),
                io.Mask.Input(
                    "mask",
                    tooltip="White where the object goes. Any size; soft edges are fine. "
                    "Several white places share one square; for a square each, use a node each.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=LARGEST,
                    step=CELL,
                    tooltip="Side of the square that the model gets, in pixels. "
                    "512 for SD 1.5, 128 for the demo model.",
                ),
                io.Float.Input(
                    "context",
                    default=1.5,
                    min=1.0,
                    max=MOST_CONTEXT,
                    step=0.1,
                    tooltip="How much of the surroundings the model sees: the square is this many "
                    "times as long as the mask. The object fits in better with more, "
                    "and is drawn finer with less.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The square, in place of the photo."),
                io.Mask.Output(display_name="mask", tooltip="Its mask, in place of the photo's."),
                CropWire.Output(
                    display_name="crop",
                    tooltip="The photo and where the square was; for CAT Stitch.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image, mask, size, context) -> io.NodeOutput:
        check_wires(mask=mask)
        check_number("size", size, 64, LARGEST, whole=True)
        check_number("context", context, 1, MOST_CONTEXT)
        crop = crop_of(image, mask, size, context)
        squares, holes = crop.sized(size)
        return io.NodeOutput(squares.movedim(1, -1), holes.squeeze(1), crop)


class CATStitch(io.ComfyNode):
    """What the model drew, in its place in the photo."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATStitch",
            display_name="CAT Stitch",
            category=CATEGORY,
            search_aliases=["inpaint stitch", "uncrop", "paste back", "composite", "拼回", "贴回"],
            description="Put the finished square back into the photo that CAT Crop Around Mask "
            "cut it out of. Outside of the mask and its soft edge the photo stays as it was.",
            inputs=[
                CropWire.Input("crop", tooltip="From CAT Crop Around Mask."),
                io.Image.Input(
                    "image",
                    tooltip="What was drawn, usually from VAE Decode. It may have been scaled, "
                    "and there may be several for each photo.",
                ),
                io.Int.Input(
                    "soft_edge",
                    default=8,
                    min=0,
                    max=WIDEST_EDGE,
                    tooltip="Pixels of the photo around the mask in which the two fade into each "
                    "other. 0 cuts exactly along the mask.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The whole photo, in its own size.")
            ],
        )

    @classmethod
    def execute(cls, crop, image, soft_edge) -> io.NodeOutput:
        check_wires(crop=crop)
        check_number("soft_edge", soft_edge, 0, WIDEST_EDGE, whole=True)
        return io.NodeOutput(stitched(crop, image, soft_edge))


def crop_of(image, mask, size: int, context: float) -> Crop:
    """The squares around the holes.

    Args:
        image: IMAGE (B, H, W, 3) in [0, 1].
        mask: MASK (B, H', W'), 1 = repaint. One for all photos, or one for each, which then has a
            square of its own; a photo with many masks is repeated.
        size: side of the squares, a multiple of 8.
        context: how many times as long as the hole the square is.
    """
    if size < CELL or size % CELL:
        raise ValueError(
            f"The size is {size}; the VAE needs a multiple of {CELL}. "
            f"Take {max(size // CELL, 1) * CELL}, or 512 for SD 1.5."
        )
    crop = crop_around_mask(*to_core(image, mask), size, context)
    empty = sum(mask_box(hole) is None for hole in crop.mask.squeeze(1))
    if empty:
        pictures = len(crop.mask)
        if pictures == 1:
            note = sentence(
                "The mask is empty: the square is the middle of the photo. Paint a mask."
            )
        else:
            note = sentence(
                "The mask of {empty} of {all} pictures is empty: "
                "the square is the middle of the photo. Paint a mask.",
                empty=empty,
                all=pictures,
            )
        say(note)
    return crop


def stitched(crop: Crop, image, soft_edge: int):
    """IMAGE (B, H, W, 3) of the photos with what was drawn in their holes.

    Args:
        crop: of the photos.
        image: IMAGE (B, h, w, 3) in [0, 1], of any size; it is scaled to the squares. There are
            as many as photos, or a multiple: then the photos are repeated.
        soft_edge: pixels of the photo.
    """
    drawn, _ = to_core(image)
    if len(drawn) % len(crop.photo):
        raise ValueError(
            f"The crop holds {len(crop.photo)} photos, here are {len(drawn)} images. "
            "Connect those that were made from this crop: as many, or several for each photo."
        )
    height, width = drawn.shape[2:]
    if height != width:
        say(
            sentence(
                "The image is {width}x{height} pixels and is squeezed into a square. "
                "Is it the one that was made from this crop?",
                width=width,
                height=height,
            )
        )
    return stitch(crop, drawn, soft_edge).movedim(1, -1)
