"""The example workflows that paint into a user's own photo, with CAT weights of their own."""

from dataclasses import replace

from release.graph import Graph, Output
from release.workflow_parts import (
    CAT_FILE,
    LOADERS,
    MODEL,
    NOTES,
    PAINT,
    PHOTO,
    PROMPTS,
    RESULT,
    SAMPLER,
    ControlNetOutputs,
    decode,
    full_checkpoint,
    object_label,
    on_photo,
    photo_with_mask,
    prompt,
    put_back,
    sample,
    save,
    stock_models,
    text,
)


def inpaint(graph: Graph) -> None:
    """A full checkpoint in one file."""
    models = full_checkpoint(graph, CAT_FILE)
    photo = graph.add(
        "LoadImage", at=(LOADERS, 240), size=(330, 400), title="Photo and mask", image=PHOTO
    )
    label = text(graph, "Object to paint (type its name)", "spoon", y=710)
    painted = on_photo(graph, models, image=photo[0], mask=photo[1], label=label)
    save(graph, painted.finished, "cat_inpaint")
    graph.note(
        f"""# Paint a named object into a photo

1. **CAT Load Checkpoint**: choose your full CAT-Diffusion checkpoint. It belongs into the folder
    **models/cat_diffusion**; press R after copying it there. Nobody has published one yet: train
    it with the pack, or try the workflow *cat_demo*.
2. **Photo and mask**: pick a picture of any size, {PAINT}.
3. **Object to paint**: type its name, for example *fire hydrant*.
4. Press **Run**. Outside the mask the photo stays exactly as it is.

**CAT Semantic Inpaint** predicts what CLIP would see if the object were there. **CAT Apply
    RefAdapter** shows that to the sampler; lower its strength to follow the prompt more and the
    scene less.""",
        at=(NOTES, 0),
        size=(390, 470),
    )


def weights(graph: Graph) -> None:
    """CAT weights beside ComfyUI's own loaders."""
    models = stock_models(graph)
    photo = photo_with_mask(graph)
    label = object_label(graph)
    painted = on_photo(graph, models, image=photo[0], mask=photo[1], label=label)
    save(graph, painted.finished, "cat_weights")
    graph.note(
        f"""# CAT weights on Stable Diffusion 1.5 Inpainting

Three files:
1. **models/checkpoints**: SD 1.5 *inpainting* (9 input channels), here
    *sd-v1-5-inpainting.ckpt*.
2. **models/clip_vision**: CLIP ViT-L/14, here *clip_vit_large_patch14.safetensors*.
3. **models/cat_diffusion**: CAT weights (SemInpainter and RefAdapter). Nobody has published any:
    train them with the pack, or look at *cat_demo* first.

Press R after copying files.

Then: **Photo and mask**: {PAINT}. **Object to paint**: its name. **Run**.

Outside the mask the photo stays exactly as it is. **Soft edge** lets the new object fade in over
    a few pixels *inside* the mask. An object that sits too tightly in its mask: add *Grow Mask*
    after the photo.""",
        at=(NOTES, 0),
        size=(390, 560),
    )


def compare(graph: Graph) -> None:
    """The same once more without CAT-Diffusion, side by side."""
    models = stock_models(graph)
    photo = photo_with_mask(graph)
    label = object_label(graph)
    painted = on_photo(graph, models, image=photo[0], mask=photo[1], label=label, result_y=850)
    y = 1120  # below everything else
    positive = prompt(graph, "Positive prompt, plain", models.clip, label[0], y=y)
    negative = prompt(graph, "Negative prompt, plain", models.clip, "", y=y + 170)
    inputs = graph.add(
        "InpaintModelConditioning",
        at=(MODEL, y),
        size=(290, 150),
        positive=positive[0],
        negative=negative[0],
        vae=models.vae,
        pixels=painted.scaled[0],
        mask=photo[1],
        noise_mask=False,
    )
    sampled = sample(
        graph,
        y=y,
        title="Plain SD 1.5 inpainting",
        model=models.model,
        positive=inputs[0],
        negative=inputs[1],
        latent_image=inputs[2],
    )
    decoded = decode(graph, sampled, models.vae, y=y + 340)
    plain = put_back(
        graph,
        "Put it back into the photo, plain",
        at=(SAMPLER, y + 460),
        destination=photo[0],
        source=decoded[0],
        mask=painted.soft_mask[0],
    )
    both = graph.add(
        "ImageStitch",
        at=(RESULT, y),
        size=(330, 150),
        title="Left plain, right CAT",
        image1=plain[0],
        direction="right",
        match_image_size=True,
        spacing_width=8,
        spacing_color="white",
        image2=painted.finished[0],
    )
    save(graph, both, "cat_compare", width=560)
    graph.note(
        """# CAT-Diffusion against plain inpainting

The same photo, mask, text, seed and steps, once with Stable Diffusion 1.5 Inpainting alone
    (lower half) and once with CAT-Diffusion (upper half). Left in the result is plain, right is
    CAT.

Both samplers should have the same seed and steps: change them in both.

Plain inpainting gets the masked photo with a grey hole as it was trained, CAT one with a black
    hole.""",
        at=(NOTES, 0),
        size=(390, 400),
    )


def reference(graph: Graph) -> None:
    """A picture of the object instead of SemInpainter's prediction."""
    models = stock_models(graph)
    photo = photo_with_mask(graph)
    label = object_label(graph)
    picture = graph.add(
        "LoadImage",
        at=(PROMPTS, 520),
        size=(300, 400),
        title="Reference picture of the object",
        image=PHOTO,
    )
    visual_prompt = graph.add(
        "CATEncodeVisualPrompt",
        at=(MODEL, 700),
        size=(290, 80),
        clip_vision=models.clip_vision,
        image=picture[0],
    )
    graph.add(
        "CATVisualPromptPreview",
        at=(MODEL, 850),
        size=(330, 240),
        visual_prompt=visual_prompt[0],
    )
    painted = on_photo(
        graph,
        models,
        image=photo[0],
        mask=photo[1],
        label=label,
        visual_prompt=visual_prompt,
    )
    save(graph, painted.finished, "cat_reference")
    graph.note(
        f"""# A picture instead of a prediction

The visual prompt comes from a **reference picture** of the object instead of SemInpainter. CLIP
    squeezes it to a square and the RefAdapter sees it as if it were the whole photo: a reference
    that shows the object at the place and in the size it should have works best.

**Photo and mask**: {PAINT}. **Object to paint** still goes to the text prompt.""",
        at=(NOTES, 0),
        size=(390, 400),
    )


def lora_controlnet(graph: Graph) -> None:
    """Beside other patches and conditionings."""
    models = stock_models(graph)
    photo = photo_with_mask(graph)
    label = object_label(graph)
    lora = graph.add(
        "LoraLoader",
        at=(LOADERS, -270),
        size=(330, 130),
        model=models.model,
        clip=models.clip,
        lora_name="your_style_lora.safetensors",
        strength_model=0.8,
        strength_clip=0.8,
    )
    control = _edge_control(graph)
    painted = on_photo(
        graph,
        replace(models, model=lora[0], clip=lora[1]),
        image=photo[0],
        mask=photo[1],
        label=label,
        control=control,
    )
    save(graph, painted.finished, "cat_lora_controlnet")
    graph.note(
        """# With LoRA and ControlNet

CAT-Diffusion is a patch on the model, so everything else goes on working: a **LoRA** before it
    (SD 1.5), a **ControlNet** on the conditioning.

The edges must belong to the photo's frame: best take the photo itself with a rough sketch of the
    object drawn in. LoRA and ControlNet are for SD 1.5; choose your own LoRA.""",
        at=(NOTES, 0),
        size=(390, 400),
    )


def _edge_control(graph: Graph) -> ControlNetOutputs:
    """A ControlNet that follows the edges of a picture."""
    sketch = graph.add(
        "LoadImage",
        at=(PROMPTS, 1130),
        size=(300, 400),
        title="Picture whose edges to follow",
        image=PHOTO,
    )
    edges = graph.add(
        "Canny",
        at=(MODEL, 1030),
        size=(290, 90),
        image=sketch[0],
        low_threshold=0.4,
        high_threshold=0.8,
    )
    net = graph.add(
        "ControlNetLoader",
        at=(MODEL, 1180),
        size=(290, 60),
        control_net_name="control_v11p_sd15_canny_fp16.safetensors",
    )
    return ControlNetOutputs(net=net[0], hint=edges[0])


def crop(graph: Graph) -> None:
    """A square of a large photo, scaled up, painted, and put back."""
    models = stock_models(graph)
    photo = photo_with_mask(graph)
    label = object_label(graph)
    left = _pixels(graph, "Left edge of the crop", 64, y=1080)
    top = _pixels(graph, "Upper edge of the crop", 64, y=1210)
    side = _pixels(graph, "Side of the crop", 256, y=1340)
    square = {"x": left, "y": top, "width": side, "height": side}
    box = graph.add("PrimitiveBoundingBox", at=(LOADERS, 1480), size=(330, 154), **square)
    part = graph.add(
        "ImageCropV2",
        at=(PROMPTS, -440),
        size=(300, 380),
        image=photo[0],
        crop_region=box[0],
    )
    hole = graph.add("CropMask", at=(MODEL, -240), size=(290, 154), mask=photo[1], **square)
    painted = on_photo(graph, models, image=part[0], mask=hole[0], label=label, result_y=850)
    whole = graph.add(
        "ImageCompositeMasked",
        at=(RESULT, 600),
        size=(330, 158),
        title="Put the crop back into the photo",
        destination=photo[0],
        source=painted.finished[0],
        x=left,
        y=top,
        resize_source=False,
    )
    save(graph, whole, "cat_crop", width=560)
    graph.note(
        f"""# A small object in a large photo

SD 1.5 works at 512x512. In a large photo a small hole would be only a few cells of CLIP's 16x16
    grid, and the object would lack detail. So a square around the hole is cropped, scaled up,
    painted, scaled down and put back.

1. **Photo and mask**: {PAINT}.
2. **Left edge**, **upper edge** and **side of the crop**, in pixels of the photo: choose a square
    two to three times as wide as the hole, inside the photo.
3. The little grid on *CAT Semantic Inpaint* shows the covered cells after the first run.

Everything here but the CAT nodes is ComfyUI's own.""",
        at=(NOTES, 0),
        size=(390, 500),
    )


def _pixels(graph: Graph, title: str, value: int, *, y: int) -> Output:
    """A number of pixels to type in, among the loaders."""
    node = graph.add("PrimitiveInt", at=(LOADERS, y), size=(330, 82), title=title, value=value)
    return node[0]
