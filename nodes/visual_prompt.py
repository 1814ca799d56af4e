"""From a picture with a hole, or a reference picture, to the visual prompt."""

import torch
from comfy_api.latest import io

from ..cat_core import features, preprocess
from . import host
from .wires import CATEGORY, CatModelWire, VisualPromptWire, to_core

CLIP_VISION_TOOLTIP = ("CLIP ViT-L/14 at 224 pixels (the image encoder of SD 1.5's text encoder), from CAT Load Checkpoint "
                       "or Load CLIP Vision.")


class CATSemanticInpaint(io.ComfyNode):
    """Step one of CAT-Diffusion: predict the CLIP features of the missing object."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATSemanticInpaint",
            display_name="CAT Semantic Inpaint",
            category=CATEGORY,
            description="Predict what CLIP would see if the named object were in the hole. The result, the visual prompt, "
                        "guides the sampler through CAT Apply RefAdapter.",
            inputs=[
                CatModelWire.Input("cat_model", tooltip="A CAT model with a SemInpainter."),
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION_TOOLTIP),
                io.Clip.Input("clip", tooltip="SD 1.5's text encoder. Clip skip and prompt weights do not matter here."),
                io.Image.Input("image", tooltip="The photo, of any size. What is under the mask is not looked at."),
                io.Mask.Input("mask", tooltip="White where the object goes. Any size; soft edges are fine."),
                io.String.Input("text", default="", tooltip="The object's name, for example: fire hydrant"),
            ],
            outputs=[VisualPromptWire.Output(display_name="VISUAL_PROMPT", tooltip="For CAT Apply RefAdapter.")],
        )

    @classmethod
    def execute(cls, cat_model, clip_vision, clip, image, mask, text) -> io.NodeOutput:
        host.require_part(cat_model, "sem_inpainter")
        text = text.strip()
        if not text:
            raise ValueError("The text is empty. Type the name of the object that belongs in the hole.")
        config = cat_model.architecture.sem_inpainter
        host.check_clip_vision(clip_vision, config.hidden_size, config.grid_size)
        patch_mask, patches, image_feature = see(clip_vision, *to_core(image, mask))
        if not patch_mask.any():
            host.say("The mask is empty: the visual prompt is just the photo's own features. Paint a mask to change it.")
        elif patch_mask.all():
            host.say("The mask covers everything: the visual prompt rests on the text alone.")
        text_feature = host.encode_text(clip, text, config.text_size)
        predicted = host.run_sem_inpainter(cat_model, patches, image_feature, text_feature, patch_mask)
        after = features.blend(predicted, patches, patch_mask)
        return io.NodeOutput(features.VisualPrompt(features.pool(after), patches, after, patch_mask, text))


class CATEncodeVisualPrompt(io.ComfyNode):
    """A visual prompt straight from CLIP, without SemInpainter."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATEncodeVisualPrompt",
            display_name="CAT Encode Visual Prompt",
            category=CATEGORY,
            description="Make a visual prompt from a reference picture, or, with a mask, from the masked photo itself "
                        "(the paper's ablation without SemInpainter).",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION_TOOLTIP),
                io.Image.Input("image", tooltip="The reference picture. It is squeezed to a square, nothing is cropped."),
                io.Mask.Input("mask", optional=True, tooltip="White parts are hidden from CLIP behind grey."),
            ],
            outputs=[VisualPromptWire.Output(display_name="VISUAL_PROMPT", tooltip="For CAT Apply RefAdapter.")],
        )

    @classmethod
    def execute(cls, clip_vision, image, mask=None) -> io.NodeOutput:
        host.check_clip_vision(clip_vision)
        patch_mask, patches, _ = see(clip_vision, *to_core(image, mask))
        return io.NodeOutput(features.VisualPrompt(features.pool(patches), patches, patches, torch.zeros_like(patch_mask)))


def see(clip_vision, image, mask) -> list[torch.Tensor]:
    """The core's image and mask -> patch mask (B, 1, G, G), patch features (B, N, D), image feature (B, D)."""
    parts = []
    for rows in host.chunks(len(image)):
        seen = preprocess.clip_input(image[rows], None if mask is None else mask[rows])
        parts.append((seen.patch_mask, *host.encode_image(clip_vision, seen.masked_image)))
    return [torch.cat(part) for part in zip(*parts)]
