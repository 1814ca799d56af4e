"""What the example workflows have in common: loaders, CAT-Diffusion, and a photo around it."""

from dataclasses import dataclass
from pathlib import Path

from release.graph import Graph, Output, PlacedNode, Step

CAT_CHECKPOINT = "cat_full_checkpoint.safetensors"
CAT_WEIGHTS = "cat_weights.safetensors"
BASE_FILE = "sd-v1-5-inpainting.ckpt"
CLIP_VISION_FILE = "clip_vit_large_patch14.safetensors"
SAMPLE_PHOTO = "cat_sample_photo.png [temp]"
PAINT = (
    "upload yours, right-click it, *Open in MaskEditor*, paint where the object goes. "
    "(*Load Image* does the same.)"
)
CHINESE_NOTES = Path(__file__).with_name("notes.zh.md")


def chinese_note(name: str) -> str:
    """A workflow's note in Chinese, in Markdown."""
    _, _, after = CHINESE_NOTES.read_text("utf-8").partition(f"<!-- {name} -->")
    return after.partition("<!--")[0].strip()


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
class Page:
    """The steps of a workflow, which fill a screen of 1440x900 from left to right."""

    guide: Step
    photo: Step
    text: Step
    models: Step
    draw: Step
    result: Step


def page(graph: Graph, *, photo: str = "Photo and mask") -> Page:
    """The steps in their columns."""
    first = graph.column(310)
    second = graph.column(320)
    third = graph.column(290)
    last = graph.column(430)
    return Page(
        guide=first.step(),
        models=first.step("Model files"),
        photo=first.step(f"1 {photo}", "photo"),
        text=second.step("2 What goes there", "text"),
        draw=third.step("3 Draw", "draw"),
        result=last.step("4 Result", "result"),
    )


def full_checkpoint(step: Step, file: str, *, height: int | None = None) -> LoaderOutputs:
    """All models from one file."""
    loader = step.add("CATLoadCheckpoint", height=height, checkpoint=file)
    return LoaderOutputs(
        model=loader[0],
        clip=loader[1],
        vae=loader[2],
        clip_vision=loader[3],
        cat_model=loader[4],
    )


def stock_models(step: Step) -> LoaderOutputs:
    """ComfyUI's own loaders, and the CAT weights."""
    base = step.add("CheckpointLoaderSimple", title="SD 1.5 inpainting", ckpt_name=BASE_FILE)
    vision = step.add("CLIPVisionLoader", title="CLIP vision", clip_name=CLIP_VISION_FILE)
    cat = step.add("CATLoadWeights", title="CAT weights", weights=CAT_WEIGHTS)
    return LoaderOutputs(
        model=base[0], clip=base[1], vae=base[2], clip_vision=vision[0], cat_model=cat[0]
    )


def sample_photo(step: Step, *, height: int = 335) -> PlacedNode:
    """A photo with a mask, which one replaces by one's own."""
    return step.add("CATSamplePhoto", height=height, title="Photo and mask", image=SAMPLE_PHOTO)


def object_label(step: Step, value: str = "spoon", title: str = "Object to paint") -> PlacedNode:
    """The object's name."""
    return step.add("PrimitiveString", height=60, title=f"{title} (type its name)", value=value)


def prompt(step: Step, title: str, clip: Output, words: Output | str) -> PlacedNode:
    """A text prompt."""
    return step.add("CLIPTextEncode", title=title, clip=clip, text=words)


def sample(step: Step, *, title: str | None = None, height: int | None = 270, **inputs):
    """KSampler as the paper samples, but for the inputs that say otherwise."""
    as_in_paper = {
        "seed": 0,
        "steps": 50,
        "cfg": 7.5,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
        "denoise": 1.0,
    }
    return step.add("KSampler", height=height, title=title, **as_in_paper | inputs)


def decode(step: Step, sampled: PlacedNode, vae: Output) -> PlacedNode:
    return step.add("VAEDecode", samples=sampled[0], vae=vae)


def put_back(step: Step, title: str, **inputs) -> PlacedNode:
    """The `source` over the `destination`, which has another size, where the `mask` is white."""
    return step.add("ImageCompositeMasked", title=title, x=0, y=0, resize_source=True, **inputs)


def save(
    step: Step, picture: PlacedNode, name: str, *, height: int = 480, first: bool = True
) -> None:
    """The finished picture, usually on top of its step; the file's name begins with `name`."""
    step.add("SaveImage", height=height, images=picture[0], filename_prefix=name)
    if first:
        step.items.insert(0, step.items.pop())


def semantic_inpaint(
    step: Step, models: LoaderOutputs, *, height: int = 560, title: str | None = None, **inputs
) -> PlacedNode:
    """SemInpainter's prediction for an image, a mask and a text."""
    return step.add(
        "CATSemanticInpaint",
        height=height,
        title=title,
        cat_model=models.cat_model,
        clip_vision=models.clip_vision,
        clip=models.clip,
        **inputs,
    )


def apply_adapter(step: Step, models: LoaderOutputs, visual_prompt: PlacedNode) -> PlacedNode:
    """RefAdapter at full strength throughout."""
    return step.add(
        "CATApplyRefAdapter",
        model=models.model,
        cat_model=models.cat_model,
        visual_prompt=visual_prompt[0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )


def cat_diffusion(
    step: Step,
    models: LoaderOutputs,
    visual_prompt: PlacedNode,
    *,
    image: Output,
    mask: Output,
    label: Output,
    control: ControlNetOutputs | None = None,
    **sampling,
) -> PlacedNode:
    """Prompts, adapter, conditioning, sampler, decoder; returns the decoder.

    Args:
        image: in the size that is painted, with its `mask`.
        sampling: KSampler's inputs, where they are not the paper's.
    """
    positive = prompt(step, "Positive prompt", models.clip, label)
    negative = prompt(step, "Negative prompt", models.clip, "")
    adapted = apply_adapter(step, models, visual_prompt)
    inputs = step.add(
        "CATInpaintConditioning",
        title="CAT Conditioning",
        positive=positive[0],
        negative=negative[0],
        vae=models.vae,
        image=image,
        mask=mask,
        fill="black",
        noise_mask=False,
    )
    conditions = inputs
    if control:
        conditions = step.add(
            "ControlNetApplyAdvanced",
            positive=inputs[0],
            negative=inputs[1],
            control_net=control.net,
            image=control.hint,
            strength=0.6,
            start_percent=0.0,
            end_percent=0.8,
        )
    sampled = sample(
        step,
        model=adapted[0],
        positive=conditions[0],
        negative=conditions[1],
        latent_image=inputs[2],
        **sampling,
    )
    return decode(step, sampled, models.vae)


def on_photo(
    steps: Page,
    models: LoaderOutputs,
    photo: PlacedNode,
    label: PlacedNode,
    name: str,
    *,
    height: int = 480,
    visual_prompt: PlacedNode | None = None,
    control: ControlNetOutputs | None = None,
    soft_edge: bool = True,
) -> None:
    """CAT-Diffusion on a photo of any size, put back where its mask is, and saved.

    Args:
        name: what the file's name begins with.
        height: of the picture on the canvas.
        visual_prompt: instead of SemInpainter's prediction.
        soft_edge: fade over a few pixels inside the mask.
    """
    if visual_prompt is None:
        visual_prompt = semantic_inpaint(
            steps.text, models, image=photo[0], mask=photo[1], text=label[0]
        )
    scaled = scaled_to_512(steps.draw, photo)
    made = cat_diffusion(
        steps.draw,
        models,
        visual_prompt,
        image=scaled[0],
        mask=photo[1],
        label=label[0],
        control=control,
    )
    mask = _soft_edge(steps.result, photo[1])[0] if soft_edge else photo[1]
    finished = put_back(
        steps.result,
        "Put it back",
        destination=photo[0],
        source=made[0],
        mask=mask,
    )
    save(steps.result, finished, name, height=height)


def scaled_to_512(step: Step, photo: PlacedNode) -> PlacedNode:
    """A photo at as many pixels as SD 1.5 was trained on."""
    return step.add(
        "ImageScaleToTotalPixels",
        title="Scale to 512x512",
        image=photo[0],
        upscale_method="lanczos",
        megapixels=0.25,
        resolution_steps=8,
    )


def _soft_edge(step: Step, mask: Output) -> PlacedNode:
    """A mask that fades over a few pixels, inside the one given."""
    # Corners stay square, since the blur is a square, too.
    shrunk = step.add("GrowMask", title="Soft edge", mask=mask, expand=-4, tapered_corners=False)
    picture = step.add("MaskToImage", title="Mask to image", mask=shrunk[0])
    blurred = step.add("ImageBlur", image=picture[0], blur_radius=4, sigma=2.0)
    return step.add("ImageToMask", title="Image to mask", image=blurred[0], channel="red")
