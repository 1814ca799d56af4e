"""How close predicted features come to the truth, for people who look rather than script."""

from dataclasses import dataclass

import torch
from comfy_api.latest import io, ui

from ..cat_core.features import masked_cosine
from ..cat_core.pictures import plots
from ..cat_core.pictures.tensors import channels_last
from .host.messages import say, sentence
from .visual_prompt import CLIP_VISION_TOOLTIP, predict, see
from .wires import CATEGORY, CatModelWire, to_core


class CATCompareFeatures(io.ComfyNode):
    """The paper's Fig. 4a for one picture or a batch."""

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
            description="Hide a part of a picture from SemInpainter, let it predict what was "
            "there, and compare: how similar are CLIP's features of the hidden part, and "
            "the predicted ones, to those of the whole picture?",
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
        comparison = compare(cat_model, clip_vision, clip, image, mask, text)
        picture = channels_last([plots.histogram(comparison.patches)])
        say(
            sentence(
                "Cosine similarity to the truth in the hole: observed {observed:.3f}, "
                "predicted {predicted:.3f} ({patches:,} patches).",
                observed=comparison.observed,
                predicted=comparison.predicted,
                patches=len(comparison.patches["observed"]),
            )
        )
        return io.NodeOutput(
            comparison.observed, comparison.predicted, picture, ui=ui.PreviewImage(picture)
        )


@dataclass(frozen=True)
class Comparison:
    """Cosine similarity to CLIP's features of the whole picture, inside the hole."""

    observed: float  # mean of the features that CLIP sees; pictures count alike
    predicted: float  # the same of those that SemInpainter predicts
    patches: dict[str, list[float]]  # "observed" and "predicted": of each patch in the hole


def compare(cat_model, clip_vision, clip, image, mask, text: str) -> Comparison:
    """Hide a part of IMAGE behind MASK and predict it; raises ValueError for an empty mask."""
    prompt = predict(cat_model, clip_vision, clip, image, mask, text)
    hole = prompt.patch_mask.flatten(1).bool()  # (B, N)
    empty = ~hole.any(1)
    if empty.any():
        raise ValueError(
            f"The mask of {empty.sum()} of {len(hole)} pictures is empty; "
            "there is nothing to compare. Paint it over the object."
        )
    _, whole, _ = see(clip_vision, *to_core(image))
    truth = whole.expand_as(prompt.before)  # one picture may have many masks
    return Comparison(
        observed=_mean(prompt.before, truth, hole),
        predicted=_mean(prompt.after, truth, hole),
        patches={
            "observed": _of_patches(prompt.before, truth, hole),
            "predicted": _of_patches(prompt.after, truth, hole),
        },
    )


def _mean(features: torch.Tensor, truth: torch.Tensor, hole: torch.Tensor) -> float:
    return masked_cosine(features, truth, hole.float()).mean().item()


def _of_patches(features: torch.Tensor, truth: torch.Tensor, hole: torch.Tensor) -> list[float]:
    return torch.nn.functional.cosine_similarity(features, truth, dim=2)[hole].tolist()
