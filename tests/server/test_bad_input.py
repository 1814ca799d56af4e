"""What a user reads when something is wrong: a sentence or two, from the node concerned."""

import pytest

from cat_diffusion.nodes.host import model_files
from comfyui.local_server import ServerError


def check(error, prompt, node, *words):
    """The prompt fails in that node, with these words in one readable line."""
    node_type, message = error(prompt)
    assert node_type == node
    for word in words:
        assert word in message, message
    assert len(message) < 700
    assert "Traceback" not in message
    assert "\n" not in message


# Models that do not belong together -----------------------------------------------------------


@pytest.mark.parametrize(
    "kind, words",
    [
        (
            "sd15",
            ("not for inpainting", "takes 4 channels, expected 9", "SD 1.5 inpainting checkpoint"),
        ),
        ("sdxl", ("SDXL", "does not fit", "SD 1.5 inpainting checkpoint")),
        ("flux", ("Flux", "does not fit", "SD 1.5 inpainting checkpoint")),
        ("wide", ("does not fit", "SD 1.5 inpainting checkpoint")),
    ],
)
def test_another_model_on_apply_ref_adapter(error, prompt, kind, words):
    prompt.inputs("CATApplyRefAdapter")["model"] = prompt.add("other", "HelperModel", kind=kind)
    check(error, prompt, "CATApplyRefAdapter", *words)


@pytest.mark.parametrize(
    "inputs, words",
    [
        (
            {"width": 48, "patch": 14, "size": 224},
            ("48 features", "expected", "32 features on a 16x16 grid", "ViT-L/14"),
        ),
        ({"width": 32, "patch": 16, "size": 224}, ("14x14 grid", "16x16 grid")),
        ({"width": 32, "patch": 14, "size": 336}, ("24x24 grid", "16x16 grid")),
    ],
)
def test_another_clip_vision(error, prompt, inputs, words):
    vision = prompt.add("other", "HelperClipVision", **inputs)
    prompt.inputs("CATSemanticInpaint")["clip_vision"] = vision
    check(error, prompt, "CATSemanticInpaint", *words)


def test_a_visual_prompt_of_another_width(error, prompt):
    vision = prompt.add("other", "HelperClipVision", width=48, patch=14, size=224)
    wide = prompt.add("wide", "CATEncodeVisualPrompt", clip_vision=vision, image=["2", 0])
    prompt.inputs("CATApplyRefAdapter")["visual_prompt"] = wide
    words = ("visual prompt is 48 wide", "expects 32", "one CAT file")
    check(error, prompt, "CATApplyRefAdapter", *words)


def test_another_grid_on_encode_visual_prompt(error, prompt):
    vision = prompt.add("other", "HelperClipVision", width=32, patch=16, size=224)
    coarse = prompt.add("coarse", "CATEncodeVisualPrompt", clip_vision=vision, image=["2", 0])
    prompt.inputs("CATApplyRefAdapter")["visual_prompt"] = coarse
    check(error, prompt, "CATEncodeVisualPrompt", "14x14 grid", "16x16 grid")


@pytest.mark.parametrize(
    "kind, words",
    [
        ("sdxl", ("g, l", "SD 1.5")),
        ("t5", ("t5xxl", "SD 1.5")),
        ("wide", ("32 wide", "expects 24")),
    ],
)
def test_another_clip(error, prompt, kind, words):
    prompt.inputs("CATSemanticInpaint")["clip"] = prompt.add("other", "HelperClip", kind=kind)
    check(error, prompt, "CATSemanticInpaint", *words)


def test_another_vae(error, prompt):
    prompt.inputs("CATInpaintConditioning")["vae"] = prompt.add("other", "HelperVae", vae=["1", 2])
    check(error, prompt, "CATInpaintConditioning", "16 channels", "SD 1.5's VAE")


def test_the_schedule_of_another_family(error, prompt):
    flux = prompt.add("other", "HelperModel", kind="flux")
    prompt.add(
        "10",
        "SamplerCustom",
        model=["8", 0],
        add_noise=True,
        noise_seed=1,
        cfg=7.5,
        positive=["9", 0],
        negative=["9", 1],
        sampler=prompt.add("ddim", "KSamplerSelect", sampler_name="ddim"),
        sigmas=prompt.add("sigmas", "CATScheduler", model=flux, steps=4, denoise=1.0),
        latent_image=["9", 2],
    )
    check(error, prompt, "CATScheduler", "discrete noise levels", "Flux")


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "needs, has, node",
    [
        ("SemInpainter", "ref_adapter", "CATSemanticInpaint"),
        ("RefAdapter", "sem_inpainter", "CATApplyRefAdapter"),
    ],
)
def test_a_cat_file_without_the_part(error, prompt, needs, has, node):
    part = prompt.add("part", "CATLoadWeights", weights=f"{has}.safetensors")
    prompt.inputs(node)["cat_model"] = part
    check(error, prompt, node, f"no {needs}", f"{has}.safetensors", "Load a file that has one")


def test_a_weights_file_as_a_full_checkpoint(error, prompt):
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "cat.safetensors"
    words = ("holds SemInpainter and RefAdapter, but no U-Net", "VAE")
    check(error, prompt, "CATLoadCheckpoint", *words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("cut.safetensors", ("cut.safetensors is damaged or cut short", "again")),
        ("empty.safetensors", ("empty (0 bytes)",)),
        ("mislabelled.safetensors", ("mislabelled", "pickle", "Rename it")),
        ("lora.safetensors", ("not a CAT-Diffusion file", "lora_unet_x")),
        ("missing.safetensors", ("U-Net in missing.safetensors", "1 missing: out.2.bias")),
        ("extra.safetensors", ("VAE in extra.safetensors", "1 unknown: extra.bias")),
        ("nan.safetensors", ("post_layernorm.bias", "SemInpainter", "NaN or Inf")),
        ("evil.ckpt", ("could run code", "nothing was run", "tools/convert.py")),
    ],
)
def test_a_broken_checkpoint(error, prompt, base, name, words):
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = name
    check(error, prompt, "CATLoadCheckpoint", *words)
    assert not (base / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "cut.safetensors",
        "empty.safetensors",
        "mislabelled.safetensors",
        "lora.safetensors",
        "nan.safetensors",
    ],
)
def test_a_broken_weights_file(error, prompt, name):
    broken = prompt.add("weights", "CATLoadWeights", weights=name)
    prompt.inputs("CATSemanticInpaint")["cat_model"] = broken
    check(error, prompt, "CATLoadWeights", name)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "../../models/outside.safetensors",
        "/etc/passwd",
        "..\\outside.safetensors",
        "no such file.safetensors",
    ],
)
def test_a_name_outside_the_folder_is_refused_before_anything_runs(server, prompt, name):
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = name
    with pytest.raises(ServerError, match="There is no"):
        server.run(prompt)


def test_a_name_that_cannot_be_written_is_refused_and_the_next_prompt_runs(server, prompt):
    """As a folder lists a file whose name is no UTF-8; the log could not write it."""
    right = prompt.inputs("CATLoadCheckpoint")["checkpoint"]
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "caf\udce9.safetensors"
    with pytest.raises(ServerError, match=r"'caf\\+udce9.safetensors': this name holds what is no"):
        server.run(prompt)
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = right
    server.run(prompt)


def test_a_name_outside_the_folder_is_refused_by_the_node_itself():
    """Even if the host's check were not there."""
    model_files.register_folder()
    for name in ("../outside.safetensors", "/etc/passwd", "../../../../etc/passwd"):
        with pytest.raises(FileNotFoundError):
            model_files.read(name)


# Pictures, masks, text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node, name, words",
    [
        ("CATLoadCheckpoint", "checkpoint", "checkpoint is missing; expected the name of a file"),
        ("CATSemanticInpaint", "cat_model", "cat_model is missing; expected a CAT_MODEL"),
        ("CATSemanticInpaint", "clip", "clip is missing; expected a CLIP"),
        ("CATSemanticInpaint", "image", "image is missing; expected an IMAGE"),
        ("CATInpaintConditioning", "mask", "mask is missing; expected a MASK"),
        ("CATInpaintConditioning", "positive", "positive is missing; expected a CONDITIONING"),
    ],
)
def test_null_in_place_of_a_link(error, prompt, node, name, words):
    """The host's own check takes it for a value."""
    prompt.inputs(node)[name] = None
    check(error, prompt, node, words, "Connect one" if name != "checkpoint" else "Choose one")


def test_half_a_character_in_a_text(error, prompt):
    prompt.inputs("CATSemanticInpaint")["text"] = "fire \ud83d hydrant"
    check(error, prompt, "CATSemanticInpaint", r"\ud83d", "half a character", "Type the name")


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty_text(error, prompt, text):
    prompt.inputs("PrimitiveString")["value"] = text
    check(error, prompt, "CATSemanticInpaint", "text is empty", "Type the name of the object")


def test_a_one_pixel_photo(error, prompt):
    dot = prompt.add("dot", "EmptyImage", width=1, height=1, batch_size=1, color=0)
    prompt.inputs("CATInpaintConditioning")["image"] = dot
    check(error, prompt, "CATInpaintConditioning", "1x1 pixels", "at least 8x8", "Scale it up")


@pytest.mark.parametrize(
    "kind, words", [("nan", ("image contains NaN",)), ("grey", ("(1, 64, 64, 1)", "expected"))]
)
@pytest.mark.parametrize("node", ["CATSemanticInpaint", "CATInpaintConditioning"])
def test_a_picture_that_is_none(error, prompt, kind, words, node):
    prompt.inputs(node)["image"] = prompt.add("odd", "HelperImage", kind=kind)
    check(error, prompt, node, *words)


def test_more_masks_than_images(error, prompt):
    images = prompt.add("images", "RepeatImageBatch", image=["2", 0], amount=2)
    as_image = prompt.add("mask image", "MaskToImage", mask=["2", 1])
    repeated = prompt.add("masks image", "RepeatImageBatch", image=as_image, amount=3)
    masks = prompt.add("masks", "ImageToMask", image=repeated, channel="red")
    prompt.inputs("CATSemanticInpaint").update(image=images, mask=masks)
    check(error, prompt, "CATSemanticInpaint", "2 images and 3 masks")


def test_a_crop_of_a_size_that_the_vae_would_cut(error, prompt):
    size = prompt.add("size", "PrimitiveInt", value=500)
    crop = prompt.add(
        "crop",
        "CATCropAroundMask",
        image=["2", 0],
        mask=["2", 1],
        size=size,
        context=1.5,
    )
    prompt.inputs("CATSemanticInpaint")["image"] = crop
    check(error, prompt, "CATCropAroundMask", "size is 500", "multiple of 8", "Take 496, or 512")


def test_results_that_do_not_belong_to_the_crop(error, prompt):
    images = prompt.add("images", "RepeatImageBatch", image=["2", 0], amount=2)
    prompt.add("crop", "CATCropAroundMask", image=images, mask=["2", 1], size=64, context=1.5)
    three = prompt.add("three", "RepeatImageBatch", image=["2", 0], amount=3)
    stitched = prompt.add("stitch", "CATStitch", crop=["crop", 2], image=three, soft_edge=8)
    prompt.inputs("SaveImage")["images"] = stitched
    check(error, prompt, "CATStitch", "holds 2 photos, here are 3 images", "from this crop")


def test_a_range_that_ends_before_it_starts(error, prompt):
    prompt.inputs("CATApplyRefAdapter").update(start_percent=0.8, end_percent=0.2)
    check(error, prompt, "CATApplyRefAdapter", "start_percent is 0.8", "end_percent 0.2")


@pytest.mark.parametrize(
    "node, name, value",
    [
        ("CATApplyRefAdapter", "strength", 99.0),
        ("CATApplyRefAdapter", "start_percent", -1.0),
        ("CATInpaintConditioning", "fill", "pink"),
    ],
)
def test_values_out_of_range_are_refused_by_the_host(server, prompt, node, name, value):
    prompt.inputs(node)[name] = value
    with pytest.raises(ServerError, match=name):
        server.run(prompt)
