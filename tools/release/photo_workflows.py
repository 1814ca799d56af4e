"""The example workflows that paint into a user's own photo, with CAT weights of their own."""

from dataclasses import replace

from release.graph import SEED, Graph, Step
from release.workflow_parts import (
    CAT_CHECKPOINT,
    PAINT,
    ControlNetOutputs,
    LoaderOutputs,
    Page,
    cat_diffusion,
    chinese_note,
    decode,
    full_checkpoint,
    object_label,
    on_photo,
    page,
    prompt,
    put_back,
    sample,
    sample_photo,
    save,
    scaled_to_512,
    semantic_inpaint,
    stock_models,
)

CUSTOM_FILE = "your_sd15_model.safetensors"
PLAIN_FILE = "v1-5-pruned-emaonly.safetensors"
NOTE = 235  # height of a note


def inpaint(graph: Graph) -> None:
    """A full checkpoint in one file."""
    steps = page(graph)
    models = full_checkpoint(steps.models, CAT_CHECKPOINT)
    photo = sample_photo(steps.photo)
    label = object_label(steps.text)
    on_photo(steps, models, photo, label, "cat_inpaint")
    steps.guide.note(
        f"""# Paint an object into a photo

**Model files** A full CAT checkpoint in **models/cat_diffusion**, here *{CAT_CHECKPOINT}*. Nobody
    has published one: train it, or try *cat_demo* first.

**1** A sample. Your photo: {PAINT}

**2** Type the object's name.

**3** Press **Run**. Outside the mask the photo stays as it is.""",
        chinese_note("cat_inpaint"),
        height=NOTE,
    )


def weights(graph: Graph) -> None:
    """CAT weights beside ComfyUI's own loaders."""
    steps = page(graph)
    models = stock_models(steps.models)
    photo = sample_photo(steps.photo)
    label = object_label(steps.text)
    on_photo(steps, models, photo, label, "cat_weights")
    steps.guide.note(
        f"""# CAT weights on SD 1.5 inpainting

**Model files** In models/checkpoints, clip_vision and cat_diffusion, in this order. Nobody has
    published CAT weights: train them, or try *cat_demo* first. Press R after copying files.

**1** A sample. Your photo: {PAINT}

**2** Type the object's name.

**3** Press **Run**. Outside the mask the photo stays as it is.""",
        chinese_note("cat_weights"),
        height=NOTE,
    )


def compare(graph: Graph) -> None:
    """The same once more without CAT-Diffusion, side by side."""
    first = graph.column(310)
    guide = first.step()
    models_step = first.step("Model files")
    photo_step = first.step("1 Photo and mask", "photo")
    text_step = graph.column(320).step("2 What goes there", "text")
    draw = graph.column(290).step("3 Draw with CAT", "draw")
    last = graph.column(430)
    result = last.step("4 Result: left plain, right CAT", "result")
    plain_step = last.step("3 Draw without CAT", "draw")
    models = stock_models(models_step)
    photo = sample_photo(photo_step)
    label = object_label(text_step)
    seed = text_step.add("PrimitiveInt", height=82, title=SEED, value=0)
    visual_prompt = semantic_inpaint(
        text_step, models, image=photo[0], mask=photo[1], text=label[0]
    )
    scaled = scaled_to_512(draw, photo)
    made = cat_diffusion(
        draw,
        models,
        visual_prompt,
        image=scaled[0],
        mask=photo[1],
        label=label[0],
        seed=seed[0],
    )
    positive = prompt(plain_step, "Positive prompt", models.clip, label[0])
    negative = prompt(plain_step, "Negative prompt", models.clip, "")
    inputs = plain_step.add(
        "InpaintModelConditioning",
        title="Plain conditioning",
        positive=positive[0],
        negative=negative[0],
        vae=models.vae,
        pixels=scaled[0],
        mask=photo[1],
        noise_mask=False,
    )
    sampled = sample(
        plain_step,
        title="Plain sampling",
        height=None,
        model=models.model,
        positive=inputs[0],
        negative=inputs[1],
        latent_image=inputs[2],
        seed=seed[0],
    )
    decoded = decode(plain_step, sampled, models.vae)
    finished = []
    for source in (decoded, made):
        finished.append(
            put_back(
                result,
                "Put it back",
                destination=photo[0],
                source=source[0],
                mask=photo[1],
            )
        )
    both = result.add(
        "ImageStitch",
        image1=finished[0][0],
        direction="right",
        match_image_size=True,
        spacing_width=8,
        spacing_color="white",
        image2=finished[1][0],
    )
    save(result, both, "cat_compare", height=330)
    guide.note(
        f"""# With CAT-Diffusion and without

The same photo, mask, text, seed and steps, once by Stable Diffusion 1.5 inpainting alone, once with
    CAT-Diffusion. Plain inpainting gets a grey hole, as it was trained, CAT a black one.

**Model files** as in *cat_weights*.

**1** A sample. Your photo: {PAINT}

**2** The seed is for both. Steps and cfg: change them in both samplers.""",
        chinese_note("cat_compare"),
        height=NOTE,
    )


def reference(graph: Graph) -> None:
    """A picture of the object instead of SemInpainter's prediction."""
    steps = page(graph)
    models = stock_models(steps.models)
    photo = sample_photo(steps.photo)
    label = object_label(steps.text)
    picture = steps.text.add(
        "LoadImage",
        height=340,
        title="Picture of the object",
        image="example.png",  # in every ComfyUI's input folder
    )
    visual_prompt = steps.text.add(
        "CATEncodeVisualPrompt",
        title="Encode the picture",
        clip_vision=models.clip_vision,
        image=picture[0],
    )
    steps.text.add("CATVisualPromptPreview", height=240, visual_prompt=visual_prompt[0])
    on_photo(steps, models, photo, label, "cat_reference", visual_prompt=visual_prompt)
    steps.guide.note(
        f"""# A picture instead of a prediction

The visual prompt is a **reference picture** in place of SemInpainter's prediction. CLIP squeezes it
    to a square, and RefAdapter takes it for the whole photo: one with the object at its place and
    in its size works best.

**Model files** as in *cat_weights*.

**1** A sample. Your photo: {PAINT}

**2** Name the object, and choose a picture of it.""",
        chinese_note("cat_reference"),
        height=NOTE,
    )


def lora_controlnet(graph: Graph) -> None:
    """Beside other patches and conditionings."""
    steps = page(graph)
    models = stock_models(steps.models)
    photo = sample_photo(steps.photo)
    label = object_label(steps.text)
    lora = steps.draw.add(
        "LoraLoader",
        model=models.model,
        clip=models.clip,
        lora_name="your_style_lora.safetensors",
        strength_model=0.8,
        strength_clip=0.8,
    )
    edges = graph.columns[-1].step("Edges to follow", "photo")
    on_photo(
        steps,
        replace(models, model=lora[0], clip=lora[1]),
        photo,
        label,
        "cat_lora_controlnet",
        height=200,
        control=_edge_control(edges),
        soft_edge=False,
    )
    steps.guide.note(
        f"""# With LoRA and ControlNet

CAT-Diffusion is a patch on the model; a **LoRA** goes before it, a **ControlNet** onto the
    conditioning, both of SD 1.5.

**Model files** as in *cat_weights*, and a LoRA of yours.

**1** A sample. Your photo: {PAINT}

**Edges to follow** must lie in the photo's frame: best the photo with a sketch of the object.""",
        chinese_note("cat_lora_controlnet"),
        height=NOTE,
    )


def _edge_control(step: Step) -> ControlNetOutputs:
    """A ControlNet that follows the edges of a picture."""
    net = step.add(
        "ControlNetLoader",
        title="ControlNet",
        control_net_name="control_v11p_sd15_canny_fp16.safetensors",
    )
    sketch = step.add(
        "LoadImage", height=310, title="Picture whose edges to follow", image="example.png"
    )
    edges = step.add("Canny", image=sketch[0], low_threshold=0.4, high_threshold=0.8)
    step.items.insert(0, step.items.pop())
    return ControlNetOutputs(net=net[0], hint=edges[0])


def crop(graph: Graph) -> None:
    """A square of a large photo, scaled up, painted, and put back."""
    steps = page(graph)
    models = stock_models(steps.models)
    photo = sample_photo(steps.photo)
    label = object_label(steps.text)
    square = steps.draw.add(
        "CATCropAroundMask", height=150, image=photo[0], mask=photo[1], size=512, context=2.0
    )
    visual_prompt = semantic_inpaint(
        steps.text, models, image=square[0], mask=square[1], text=label[0]
    )
    made = cat_diffusion(
        steps.draw, models, visual_prompt, image=square[0], mask=square[1], label=label[0]
    )
    whole = steps.result.add("CATStitch", height=80, crop=square[2], image=made[0], soft_edge=8)
    save(steps.result, whole, "cat_crop", height=560)
    steps.guide.note(
        f"""# A small object in a large photo

SD 1.5 draws at 512x512. A small hole in a large photo is only a few cells of CLIP's grid, so the
    square around it is cut out, painted, and put back.

**Model files** as in *cat_weights*.

**1** A sample. Your photo: {PAINT}

**3** *context*: how many times as long as the mask the square is. **4** *soft edge* in pixels.""",
        chinese_note("cat_crop"),
        height=NOTE,
    )


def custom_checkpoint(graph: Graph) -> None:
    """A checkpoint for text to picture, made one for inpainting, with CAT-Diffusion last."""
    steps = page(graph)
    models = _custom_models(steps)
    photo = sample_photo(steps.photo)
    label = object_label(steps.text)
    on_photo(steps, models, photo, label, "cat_custom_checkpoint")
    steps.guide.note(
        f"""# Your SD 1.5 checkpoint, for inpainting

**3** Subtract takes SD 1.5 from SD 1.5 *inpainting*; Add puts your checkpoint to what is left.
    **Keep the order**: model1 has the nine channels. The log's SHAPE MISMATCH of one layer is
    right. RefAdapter comes last.

**Model files** as in *cat_weights*; yours and SD 1.5 in **3**.

**1** A sample. Your photo: {PAINT}""",
        chinese_note("cat_custom_checkpoint"),
        height=NOTE,
    )


def _custom_models(steps: Page) -> LoaderOutputs:
    """One's own checkpoint + (SD 1.5 inpainting - SD 1.5), by ComfyUI's own nodes."""
    stock = stock_models(steps.models)
    custom = steps.draw.add(
        "CheckpointLoaderSimple", title="Your checkpoint", ckpt_name=CUSTOM_FILE
    )
    plain = steps.draw.add("CheckpointLoaderSimple", title="SD 1.5", ckpt_name=PLAIN_FILE)
    difference = steps.draw.add(
        "ModelMergeSubtract",
        title="Inpainting - SD 1.5",
        model1=stock.model,
        model2=plain[0],
        multiplier=1.0,
    )
    merged = steps.draw.add(
        "ModelMergeAdd", title="... + yours", model1=difference[0], model2=custom[0]
    )
    return replace(stock, model=merged[0], clip=custom[1], vae=custom[2])
