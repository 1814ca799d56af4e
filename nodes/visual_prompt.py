"""From a picture with a hole, or a reference picture, to the visual prompt."""

from dataclasses import dataclass, replace

import torch
from comfy_api.latest import io, ui

from ..cat_core import features, preprocess
from ..cat_core.pictures import preview
from .checks import check_wires, object_name
from .host import memory
from .host.cat_model import require_part, run_sem_inpainter
from .host.clip import check_clip_vision, encode_image, encode_text, left_out, text_similarity
from .host.messages import language, say, sentence
from .notes import about_cells, about_length, about_name
from .wires import CATEGORY, CatModelWire, VisualPromptWire, common_batch, to_core

CLIP_VISION_TOOLTIP = (
    "CLIP ViT-L/14 at 224 pixels (the image encoder of SD 1.5's text encoder), "
    "from CAT Load Checkpoint or Load CLIP Vision."
)


class CATSemanticInpaint(io.ComfyNode):
    """Step one of CAT-Diffusion: predict the CLIP features of the missing object."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATSemanticInpaint",
            display_name="CAT Semantic Inpaint",
            category=CATEGORY,
            search_aliases=[
                "pre-inpaint",
                "semantic pre-inpainting",
                "add object",
                "object inpainting",
                "seminpainter",
                "语义修复",
                "添加物体",
            ],
            description="Predict what CLIP would see if the named object were in the hole. "
            "The result, the visual prompt, guides the sampler through CAT Apply RefAdapter.",
            inputs=[
                CatModelWire.Input("cat_model", tooltip="A CAT model with a SemInpainter."),
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION_TOOLTIP),
                io.Clip.Input(
                    "clip",
                    tooltip="SD 1.5's text encoder. "
                    "Clip skip and prompt weights do not matter here.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="The photo, of any size. What is under the mask is not looked at.",
                ),
                io.Mask.Input(
                    "mask", tooltip="White where the object goes. Any size; soft edges are fine."
                ),
                io.String.Input(
                    "text", default="", tooltip="The object's name, for example: fire hydrant"
                ),
                VisualPromptWire.Input(
                    "previous",
                    optional=True,
                    tooltip="For a second object in the same photo: the visual prompt of the "
                    "first, with a mask of its own. This one then holds both.",
                ),
            ],
            outputs=[
                VisualPromptWire.Output(
                    display_name="VISUAL_PROMPT", tooltip="For CAT Apply RefAdapter."
                )
            ],
        )

    @classmethod
    def execute(
        cls, cat_model, clip_vision, clip, image, mask, text, previous=None
    ) -> io.NodeOutput:
        prompt = predict(cat_model, clip_vision, clip, image, mask, text, previous)
        # Of a long batch the first: here the picture is a by-product.
        picture = draw(_first(prompt, memory.BATCH), clip, clip_vision)
        shown = ui.PreviewImage(picture).as_dict()
        shown["cat_cells"] = _cells(prompt.patch_mask)  # web/js/masked_cells.js draws them
        return io.NodeOutput(prompt, ui=shown)


class CATEncodeVisualPrompt(io.ComfyNode):
    """A visual prompt straight from CLIP, without SemInpainter."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATEncodeVisualPrompt",
            display_name="CAT Encode Visual Prompt",
            category=CATEGORY,
            search_aliases=[
                "reference image",
                "image prompt",
                "ip-adapter",
                "clip vision encode",
                "参考图",
            ],
            description="Make a visual prompt from a reference picture, or, with a mask, from the "
            "masked photo itself (the paper's ablation without SemInpainter).",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip=CLIP_VISION_TOOLTIP),
                io.Image.Input(
                    "image",
                    tooltip="The reference picture. "
                    "It is squeezed to a square, nothing is cropped.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White parts are hidden from CLIP behind grey."
                ),
            ],
            outputs=[
                VisualPromptWire.Output(
                    display_name="VISUAL_PROMPT", tooltip="For CAT Apply RefAdapter."
                )
            ],
        )

    @classmethod
    def execute(cls, clip_vision, image, mask=None) -> io.NodeOutput:
        return io.NodeOutput(encode_visual_prompt(clip_vision, image, mask))


class CATVisualPromptPreview(io.ComfyNode):
    """What a visual prompt holds, as a picture."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATVisualPromptPreview",
            display_name="CAT Visual Prompt Preview",
            category=f"{CATEGORY}/preview",
            search_aliases=["show visual prompt", "mask grid", "pca features", "heatmap", "预览"],
            description="Look at a visual prompt: the photo as CLIP saw it with its 16x16 grid and "
            "the hidden cells, the features before and after as colours, and how similar each "
            "cell is to the text.",
            is_output_node=True,
            inputs=[
                VisualPromptWire.Input(
                    "visual_prompt",
                    tooltip="From CAT Semantic Inpaint or CAT Encode Visual Prompt.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="With clip_vision: adds the similarity to the text. It needs a CLIP "
                    "with a text projection: the demo model has one, SD 1.5 checkpoints have none.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder that made the visual prompt.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="preview",
                    tooltip="One row of panels for each picture of the batch.",
                )
            ],
        )

    @classmethod
    def execute(cls, visual_prompt, clip=None, clip_vision=None) -> io.NodeOutput:
        check_wires(visual_prompt=visual_prompt)
        encoders = {"clip": clip, "clip_vision": clip_vision}
        check_wires(**{name: value for name, value in encoders.items() if value is not None})
        asked = bool(visual_prompt.text and clip and clip_vision)
        if asked and text_similarity(clip, clip_vision, visual_prompt) is None:
            say(
                sentence(
                    "The similarity to the text is left out: "
                    "this CLIP, or CLIP vision, has no projection."
                )
            )
        picture = draw(visual_prompt, clip, clip_vision)
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture))


def encode_visual_prompt(clip_vision, image, mask=None) -> features.VisualPrompt:
    """A visual prompt straight from CLIP, without SemInpainter.

    Args:
        image: IMAGE (B, H, W, 3) in [0, 1].
        mask: MASK (B, H, W); CLIP sees grey where it is 1.
    """
    check_wires(clip_vision=clip_vision)
    check_clip_vision(clip_vision)
    photo, hole = to_core(image, mask)
    seen, patches, _ = see(clip_vision, photo, hole)
    return features.VisualPrompt(
        tokens=features.pool(patches),
        before=patches,
        after=patches,
        patch_mask=torch.zeros_like(seen.patch_mask),
        picture=seen.masked_image,
        mask=hole,
    )


def predict(
    cat_model,
    clip_vision,
    clip,
    image,
    mask,
    text: str,
    previous: features.VisualPrompt | None = None,
) -> features.VisualPrompt:
    """A visual prompt that holds the named object, by SemInpainter.

    Args:
        image: IMAGE (B, H, W, 3) in [0, 1].
        mask: MASK (B, H, W), 1 = where the object goes.
        text: the object's name.
        previous: of another hole in the same photo. CLIP sees neither hole, and in the earlier
            one the features are those that were predicted there.
    """
    check_wires(cat_model=cat_model, clip_vision=clip_vision, clip=clip, mask=mask)
    require_part(cat_model, "sem_inpainter")
    label = object_name(text)
    config = cat_model.architecture.sem_inpainter
    check_clip_vision(clip_vision, config.hidden_size, config.grid_size)
    photo, hole = to_core(image, mask)
    if previous is None:
        observation = _first_object(clip_vision, photo, hole)
    else:
        observation = _next_object(clip_vision, photo, hole, previous, config.hidden_size)
    say(
        *about_name(cat_model.knowledge, label),
        *about_length(left_out(clip, label)),
        *about_cells(observation.patch_mask),
    )
    predicted = run_sem_inpainter(
        cat_model,
        observation.patches,
        observation.image_feature,
        encode_text(clip, label, config.text_size),
        observation.patch_mask,
    )
    after = features.blend(predicted.patches, observation.patches, observation.patch_mask)
    return features.VisualPrompt(
        tokens=features.pool(after),
        before=observation.patches,
        after=after,
        patch_mask=observation.seen.patch_mask,
        picture=observation.seen.masked_image,
        mask=observation.hidden,
        text=label,
        image_feature=predicted.image,
    )


@dataclass(frozen=True)
class Observation:
    """What SemInpainter gets of a photo besides the text.

    Attributes:
        seen: what CLIP was shown.
        hidden: (B, 1, H, W), all that was hidden from it.
        patches: (B, N, D), its features; in earlier holes those that were predicted there.
        image_feature: (B, D).
        patch_mask: (B, 1, G, G), of the hole that is to be filled now.
    """

    seen: preprocess.ClipInput
    hidden: torch.Tensor
    patches: torch.Tensor
    image_feature: torch.Tensor
    patch_mask: torch.Tensor


def _first_object(clip_vision, photo: torch.Tensor, hole: torch.Tensor) -> Observation:
    seen, patches, image_feature = see(clip_vision, photo, hole)
    return Observation(seen, hole, patches, image_feature, seen.patch_mask)


def _next_object(
    clip_vision,
    photo: torch.Tensor,
    hole: torch.Tensor,
    previous: features.VisualPrompt,
    width: int,
) -> Observation:
    """The same beside the object of an earlier hole; `width` is SemInpainter's."""
    hidden = union(hole, previous, width)
    photos = photo.expand(len(hidden), -1, -1, -1)
    holes = hole.expand(len(hidden), -1, -1, -1)
    seen, observed, image_feature = see(clip_vision, photos, hidden)
    known = previous.after.expand_as(observed).to(observed)
    patches = features.blend(known, observed, seen.patch_mask * previous.patch_mask)
    patch_mask = preprocess.clip_input(photos, holes).patch_mask
    return Observation(seen, hidden, patches, image_feature, patch_mask)


def union(mask: torch.Tensor, previous: features.VisualPrompt, width: int) -> torch.Tensor:
    """(B, 1, H, W): this hole and the one before it; raises if they do not belong together."""
    check_wires(previous=previous)
    if previous.before.shape[2] != width:
        raise ValueError(
            f"previous is {previous.before.shape[2]} wide, this SemInpainter makes {width}. "
            "Take both visual prompts from the same CAT model."
        )
    if previous.mask is None:
        raise ValueError(
            "previous has no mask: it holds a whole picture, not an object in a hole. "
            "Connect a visual prompt from CAT Semantic Inpaint."
        )
    pictures = len(previous.tokens)
    common_batch(
        len(mask),
        pictures,
        f"previous holds {pictures} pictures, here are {len(mask)}. "
        "Connect as many, or one of either.",
    )
    return torch.maximum(mask, preprocess.resize_mask(previous.mask, *mask.shape[-2:]))


def see(clip_vision, image, mask) -> tuple[preprocess.ClipInput, torch.Tensor, torch.Tensor]:
    """What CLIP sees of a picture, its patch features (B, N, D) and image feature (B, D).

    Args:
        image: (B, 3, H, W) in [0, 1].
        mask: (B, 1, H, W), 1 = hidden behind grey; None hides nothing.
    """
    inputs = []
    patches = []
    image_features = []
    for rows in memory.chunks(len(image)):
        seen = preprocess.clip_input(image[rows], None if mask is None else mask[rows])
        chunk_patches, chunk_feature = encode_image(clip_vision, seen.masked_image)
        inputs.append(seen)
        patches.append(chunk_patches)
        image_features.append(chunk_feature)
    everything = preprocess.ClipInput(
        image=torch.cat([seen.image for seen in inputs]),
        masked_image=torch.cat([seen.masked_image for seen in inputs]),
        patch_mask=torch.cat([seen.patch_mask for seen in inputs]),
    )
    return everything, torch.cat(patches), torch.cat(image_features)


def draw(prompt: features.VisualPrompt, clip=None, clip_vision=None) -> torch.Tensor:
    """The visual prompt as IMAGE.

    With the similarity to its text where both encoders have a projection.
    """
    similarity = None
    if prompt.text and clip and clip_vision:
        similarity = text_similarity(clip, clip_vision, prompt)
    return preview.preview_rows(prompt, similarity, language())


def _first(prompt: features.VisualPrompt, count: int) -> features.VisualPrompt:
    """The visual prompt of the first pictures; its mask is not needed to draw it."""
    return replace(
        prompt,
        tokens=prompt.tokens[:count],
        before=prompt.before[:count],
        after=prompt.after[:count],
        patch_mask=prompt.patch_mask[:count],
        picture=prompt.picture[:count],
    )


def _cells(patch_mask: torch.Tensor) -> list[str]:
    """A string of 0 and 1 for each picture, row by row."""
    cells = []
    for row in patch_mask.flatten(1).to(torch.uint8).tolist():
        cells.append("".join(str(cell) for cell in row))
    return cells
