"""How close predicted features come to the truth, for people who look rather than script."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..cat_core.pictures import plots
from ..cat_core.training.objectives import masked_cosine
from .host import messages
from .visual_prompt import CLIP_VISION_TOOLTIP, predict, see
from .wires import CATEGORY, CatModelWire, to_core


class CATCompareFeatures(io.ComfyNode):
    """The paper's Fig. 4a for one picture or a batch: cosine similarity to the whole picture's features, inside the hole."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATCompareFeatures",
            display_name="CAT Compare Features",
            category=f"{CATEGORY}/preview",
            search_aliases=[
                "cosine similarity",
                "evaluate seminpainter",
                "histogram",
                "余弦相似度",
            ],
            description="Hide a part of a picture from SemInpainter, let it predict what was there, and compare: how similar "
            "are CLIP's features of the hidden part, and the predicted ones, to those of the whole picture?",
            is_output_node=True,
            inputs=[
                CatModelWire.Input("cat_model", tooltip="A CAT model with a SemInpainter."),
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION_TOOLTIP),
                io.Clip.Input("clip", tooltip="SD 1.5's text encoder."),
                io.Image.Input(
                    "image", tooltip="The whole, true picture, with the object in it. Any size."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White where the object is: hidden from SemInpainter, and compared.",
                ),
                io.String.Input(
                    "text", default="", tooltip="The object's name, for example: fire hydrant"
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="observed",
                    tooltip="Mean cosine similarity in the hole of what CLIP sees with the "
                    "hole filled grey, -1 to 1.",
                ),
                io.Float.Output(
                    display_name="predicted",
                    tooltip="The same of what SemInpainter predicts. Higher than observed "
                    "means that it helps.",
                ),
                io.Image.Output(
                    display_name="histogram",
                    tooltip="Both similarities over all patches in the hole.",
                ),
            ],
        )

    @classmethod
    def execute(cls, cat_model, clip_vision, clip, image, mask, text) -> io.NodeOutput:
        prompt = predict(cat_model, clip_vision, clip, image, mask, text)
        m = prompt.patch_mask.flatten(1).bool()  # (B, N)
        if not m.any(1).all():
            raise ValueError(
                f"The mask of {(~m.any(1)).sum()} of {len(m)} pictures is empty; there is nothing to compare. "
                "Paint it over the object."
            )
        _, whole, _ = see(clip_vision, *to_core(image))
        whole = whole.expand_as(prompt.before)  # one picture may have many masks
        means, patches = {}, {}
        for name, features in (("observed", prompt.before), ("predicted", prompt.after)):
            means[name] = (
                masked_cosine(features, whole, m.float()).mean().item()
            )  # pictures count alike
            patches[name] = torch.nn.functional.cosine_similarity(features, whole, dim=2)[
                m
            ].tolist()
        picture = torch.from_numpy(np.array(plots.histogram(patches), np.float32) / 255)[None]
        messages.say(
            f"Cosine similarity to the truth in the hole: observed {means['observed']:.3f}, "
            f"predicted {means['predicted']:.3f} ({m.sum():,} patches)."
        )
        return io.NodeOutput(*means.values(), picture, ui=ui.PreviewImage(picture))
