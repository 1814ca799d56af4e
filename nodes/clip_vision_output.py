"""The features of a visual prompt on a wire of ComfyUI's own, for nodes of others."""

import math

import torch
from comfy_api.latest import io

from ..cat_core.features import VisualPrompt
from .checks import check_wires
from .host import memory
from .host.clip import check_clip_vision, class_token, normed, project_image, vision_output
from .host.messages import say, sentence
from .wires import CATEGORY, VisualPromptWire


class CATVisualPromptToClipVision(io.ComfyNode):
    """What CLIP Vision Encode would give if the predicted object were in the picture."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATVisualPromptToClipVision",
            display_name="CAT Visual Prompt to CLIP Vision",
            category=CATEGORY,
            search_aliases=[
                "clip vision output",
                "clip vision encode",
                "style model",
                "unclip",
                "视觉提示转换",
            ],
            description="Hand a visual prompt to ComfyUI's own nodes, and to those of other packs: "
            "the same CLIP_VISION_OUTPUT as from CLIP Vision Encode, with the predicted features "
            "in the hole.",
            inputs=[
                VisualPromptWire.Input(
                    "visual_prompt",
                    tooltip="From CAT Semantic Inpaint or CAT Encode Visual Prompt.",
                ),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder that made the visual prompt."
                ),
            ],
            outputs=[
                io.ClipVisionOutput.Output(
                    display_name="CLIP_VISION_OUTPUT",
                    tooltip="For Apply Style Model, unCLIPConditioning and nodes like these.",
                )
            ],
        )

    @classmethod
    def execute(cls, visual_prompt, clip_vision) -> io.NodeOutput:
        check_wires(visual_prompt=visual_prompt, clip_vision=clip_vision)
        cells, width = visual_prompt.after.shape[1:]
        check_clip_vision(clip_vision, width, math.isqrt(cells))
        tokens = class_tokens(visual_prompt, clip_vision)
        image_feature = visual_prompt.image_feature
        if image_feature is None:
            image_feature = normed(clip_vision, tokens[:, 0])
        image_embeds = project_image(clip_vision, image_feature)
        if image_embeds is None:
            image_embeds = image_feature
            say(
                sentence(
                    "This CLIP vision has no projection: "
                    "its image feature is handed on as it is, {width} wide.",
                    width=width,
                )
            )
        hidden = torch.cat((tokens, visual_prompt.after), dim=1)  # (B, N + 1, D)
        return io.NodeOutput(vision_output(hidden, image_embeds))


def class_tokens(visual_prompt: VisualPrompt, clip_vision) -> torch.Tensor:
    """CLIP's token of the whole picture, as it leaves the last layer, (B, 1, D).

    It is that of the picture with its hole: what SemInpainter predicts has CLIP's last norm
    already.
    """
    picture = visual_prompt.picture
    tokens = [class_token(clip_vision, picture[rows]) for rows in memory.chunks(len(picture))]
    return torch.cat(tokens).to(visual_prompt.after)
