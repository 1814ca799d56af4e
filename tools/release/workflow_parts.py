"""What the example workflows have in common: loaders, CAT-Diffusion, and a photo around it."""

from dataclasses import dataclass

from release.graph import Graph, Output, PlacedNode

# Columns of the canvas, from left to right: where their nodes begin.
NOTES = -440
LOADERS = 0
PROMPTS = 390
MODEL = 780
SAMPLER = 1150
RESULT = 1540

PAINT = "right-click it, *Open in Mask Editor*, paint where the object goes, save"
CAT_FILE = "cat_diffusion.safetensors"
BASE_FILE = "sd-v1-5-inpainting.ckpt"
CLIP_VISION_FILE = "clip_vit_large_patch14.safetensors"
PHOTO = "example.png"  # in every ComfyUI's input folder


@dataclass(frozen=True)
class LoaderOutputs:
    """The models of a workflow."""

    model: Output
    clip: Output
    vae: Output
    clip_vision: Output
    cat_model: Output


@dataclass(frozen=True)
class ControlNetOutputs:
    """A ControlNet and the picture that it follows."""

    net: Output
    hint: Output


@dataclass(frozen=True)
class PaintedPhoto:
    """What `on_photo` leaves on the canvas."""

    scaled: PlacedNode  # the photo in the size that was painted
    soft_mask: PlacedNode
    finished: PlacedNode  # the picture in the photo's own size


def full_checkpoint(graph: Graph, file: str) -> LoaderOutputs:
    """All models from one file."""
    loader = graph.add("CATLoadCheckpoint", at=(LOADERS, 0), size=(330, 170), checkpoint=file)
    return LoaderOutputs(
        model=loader[0],
        clip=loader[1],
        vae=loader[2],
        clip_vision=loader[3],
        cat_model=loader[4],
    )


def stock_models(graph: Graph) -> LoaderOutputs:
    """ComfyUI's own loaders, and the CAT weights."""
    base = graph.add(
        "CheckpointLoaderSimple", at=(LOADERS, 0), size=(330, 100), ckpt_name=BASE_FILE
    )
    vision = graph.add(
        "CLIPVisionLoader", at=(LOADERS, 220), size=(330, 60), clip_name=CLIP_VISION_FILE
    )
    cat = graph.add("CATLoadWeights", at=(LOADERS, 380), size=(330, 60), weights=CAT_FILE)
    return LoaderOutputs(
        model=base[0], clip=base[1], vae=base[2], clip_vision=vision[0], cat_model=cat[0]
    )


def photo_with_mask(graph: Graph) -> PlacedNode:
    """The photo, below ComfyUI's own loaders."""
    return graph.add(
        "LoadImage", at=(LOADERS, 540), size=(330, 330), title="Photo and mask", image=PHOTO
    )


def object_label(graph: Graph) -> PlacedNode:
    """The object's name, below the photo."""
    return text(graph, "Object to paint (type its name)", "spoon", y=940)


def text(graph: Graph, title: str, value: str, *, y: int) -> PlacedNode:
    """A text to type in, among the loaders."""
    return graph.add("PrimitiveString", at=(LOADERS, y), size=(330, 70), title=title, value=value)


def prompt(graph: Graph, title: str, clip: Output, words: Output | str, *, y: int) -> PlacedNode:
    """A text prompt."""
    return graph.add(
        "CLIPTextEncode", at=(PROMPTS, y), size=(300, 102), title=title, clip=clip, text=words
    )


def sample(graph: Graph, *, y: int, title: str | None = None, **inputs) -> PlacedNode:
    """KSampler as the paper samples, but for the inputs that say otherwise."""
    as_in_paper = {
        "seed": 0,
        "steps": 50,
        "cfg": 7.5,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
        "denoise": 1.0,
    }
    return graph.add(
        "KSampler", at=(SAMPLER, y), size=(330, 270), title=title, **as_in_paper | inputs
    )


def decode(graph: Graph, sampled: PlacedNode, vae: Output, *, y: int) -> PlacedNode:
    return graph.add("VAEDecode", at=(SAMPLER, y), size=(330, 54), samples=sampled[0], vae=vae)


def put_back(graph: Graph, title: str, *, at: tuple[int, int], **inputs) -> PlacedNode:
    """The `source` over the `destination`, which has another size, where the `mask` is white."""
    return graph.add(
        "ImageCompositeMasked",
        at=at,
        size=(330, 158),
        title=title,
        x=0,
        y=0,
        resize_source=True,
        **inputs,
    )


def save(graph: Graph, picture: PlacedNode, name: str, *, width: int = 440) -> None:
    """The finished picture; the file's name begins with `name`."""
    graph.add(
        "SaveImage",
        at=(RESULT, 0),
        size=(width, 540),
        images=picture[0],
        filename_prefix=name,
    )


def apply_adapter(
    graph: Graph, models: LoaderOutputs, visual_prompt: PlacedNode, **place
) -> PlacedNode:
    """RefAdapter at full strength throughout."""
    return graph.add(
        "CATApplyRefAdapter",
        **place,
        model=models.model,
        cat_model=models.cat_model,
        visual_prompt=visual_prompt[0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )


def cat_diffusion(
    graph: Graph,
    models: LoaderOutputs,
    *,
    image: Output,
    mask: Output,
    label: Output,
    scaled: Output,
    visual_prompt: PlacedNode | None = None,
    control: ControlNetOutputs | None = None,
    **sampling,
) -> PlacedNode:
    """Prompts, visual prompt, conditioning, sampler, decoder; returns the decoder.

    Args:
        image: what CLIP sees, with its `mask`.
        scaled: the same picture in the size that is painted.
        visual_prompt: instead of SemInpainter's prediction.
        sampling: KSampler's inputs, where they are not the paper's.
    """
    positive = prompt(graph, "Positive prompt", models.clip, label, y=0)
    negative = prompt(graph, "Negative prompt", models.clip, "", y=170)
    if visual_prompt is None:
        visual_prompt = graph.add(
            "CATSemanticInpaint",
            at=(PROMPTS, 500),
            size=(330, 560),
            cat_model=models.cat_model,
            clip_vision=models.clip_vision,
            clip=models.clip,
            image=image,
            mask=mask,
            text=label,
        )
    adapted = apply_adapter(graph, models, visual_prompt, at=(MODEL, 0), size=(310, 182))
    inputs = graph.add(
        "CATInpaintConditioning",
        at=(MODEL, 250),
        size=(310, 194),
        positive=positive[0],
        negative=negative[0],
        vae=models.vae,
        image=scaled,
        mask=mask,
        fill="black",
        noise_mask=False,
    )
    conditions = inputs
    if control:
        conditions = graph.add(
            "ControlNetApplyAdvanced",
            at=(MODEL, 510),
            size=(310, 190),
            positive=inputs[0],
            negative=inputs[1],
            control_net=control.net,
            image=control.hint,
            strength=0.6,
            start_percent=0.0,
            end_percent=0.8,
        )
    sampled = sample(
        graph,
        y=0,
        model=adapted[0],
        positive=conditions[0],
        negative=conditions[1],
        latent_image=inputs[2],
        **sampling,
    )
    return decode(graph, sampled, models.vae, y=340)


def on_photo(
    graph: Graph,
    models: LoaderOutputs,
    *,
    image: Output,
    mask: Output,
    label: PlacedNode,
    result_y: int = 600,
    visual_prompt: PlacedNode | None = None,
    control: ControlNetOutputs | None = None,
) -> PaintedPhoto:
    """CAT-Diffusion on a photo of any size, put back with a soft edge by a node at `result_y`."""
    scaled = graph.add(
        "ImageScaleToTotalPixels",
        at=(PROMPTS, 320),
        size=(300, 114),
        title="Scale to the size of SD 1.5",
        image=image,
        upscale_method="lanczos",
        megapixels=0.25,
        resolution_steps=8,
    )
    made = cat_diffusion(
        graph,
        models,
        image=image,
        mask=mask,
        label=label[0],
        scaled=scaled[0],
        visual_prompt=visual_prompt,
        control=control,
    )
    soft_mask = _soft_edge(graph, mask)
    finished = put_back(
        graph,
        "Put it back into the photo",
        at=(RESULT, result_y),
        destination=image,
        source=made[0],
        mask=soft_mask[0],
    )
    return PaintedPhoto(scaled=scaled, soft_mask=soft_mask, finished=finished)


def _soft_edge(graph: Graph, mask: Output) -> PlacedNode:
    """A mask that fades over a few pixels, inside the one given."""
    # Corners stay square, since the blur is a square, too.
    shrunk = graph.add(
        "GrowMask",
        at=(SAMPLER, 450),
        size=(330, 86),
        title="Soft edge, inwards",
        mask=mask,
        expand=-4,
        tapered_corners=False,
    )
    picture = graph.add("MaskToImage", at=(SAMPLER, 610), size=(330, 30), mask=shrunk[0])
    blurred = graph.add(
        "ImageBlur",
        at=(SAMPLER, 710),
        size=(330, 86),
        image=picture[0],
        blur_radius=4,
        sigma=2.0,
    )
    return graph.add(
        "ImageToMask", at=(SAMPLER, 860), size=(330, 60), image=blurred[0], channel="red"
    )
