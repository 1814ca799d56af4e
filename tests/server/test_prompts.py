"""Real prompts through a real server: what users take for granted."""

import itertools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

CAT_NODES = ("CATSemanticInpaint", "CATInpaintConditioning")  # both get the photo and the mask


# Again ----------------------------------------------------------------------------------------


def test_queueing_again_reproduces_and_a_new_strength_reloads_nothing(prompt, run):
    _, latent = run(prompt)
    prompt.inputs("KSampler")["steps"] = 3
    run(prompt)
    prompt.inputs("KSampler")["steps"] = 2
    assert torch.equal(run(prompt)[1], latent)
    prompt.inputs("CATApplyRefAdapter")["strength"] = 0.5
    changed, other = run(prompt)
    assert not torch.equal(other, latent)
    assert {"8", "10"} <= set(changed.seconds)
    assert not {"1", "4", "9"} & set(changed.seconds)


class Heard:
    """Which nodes a prompt found in the cache, and which it ran, by the server's own events."""

    def __init__(self):
        self.cached = set()
        self.executed = set()

    def __call__(self, kind, data):
        if kind == "execution_cached":
            self.cached.update(data["nodes"])
        elif kind == "executing" and data["node"] is not None:
            self.executed.add(data["node"])


def test_another_seed_or_strength_runs_neither_clip_vision_nor_sem_inpainter_again(prompt, run):
    """Both run in CAT Semantic Inpaint, folding in CAT Apply RefAdapter."""

    def queue(node, **changes):
        prompt.inputs(node).update(changes)
        heard = Heard()
        _, latent = run(prompt, on_event=heard)
        return latent, heard

    numbers = {node["class_type"]: number for number, node in prompt.items()}
    each_time = set()
    for name in ("KSampler", "VAEDecode", "ImageCompositeMasked", "SaveImage", "SaveLatent"):
        each_time.add(numbers[name])
    once = set(prompt) - each_time
    for name in ("CATLoadCheckpoint", "CATSemanticInpaint", "CATApplyRefAdapter"):
        assert numbers[name] in once

    previous, _ = queue("KSampler", seed=4)
    for changes in ({"seed": 5}, {"steps": 3}, {"cfg": 2.0}):
        latent, heard = queue("KSampler", **changes)
        assert not torch.equal(latent, previous)
        assert once <= heard.cached
        assert heard.executed == each_time
        previous = latent
    _, heard = queue("CATApplyRefAdapter", strength=0.5)
    folding = {numbers["CATApplyRefAdapter"]}
    assert once - folding <= heard.cached
    assert heard.executed == each_time | folding


# Models ---------------------------------------------------------------------------------------


def test_strength_0_equals_the_workflow_without_the_adapter(prompt, run):
    prompt.inputs("CATApplyRefAdapter")["strength"] = 0.0
    _, zero = run(prompt)
    prompt.inputs("KSampler")["model"] = ["1", 0]
    _, plain = run(prompt)
    assert torch.equal(zero, plain)


def test_parts_from_separate_files_give_the_same_picture(prompt, run):
    _, whole = run(prompt)
    for name, node, file in (
        ("sem", "CATSemanticInpaint", "sem_inpainter.safetensors"),
        ("ref", "CATApplyRefAdapter", "ref_adapter.safetensors"),
    ):
        prompt.inputs(node)["cat_model"] = prompt.add(name, "CATLoadWeights", weights=file)
    result, parts = run(prompt)
    assert torch.equal(whole, parts)
    assert result.texts["sem"].endswith("SemInpainter")
    assert result.texts["ref"].endswith("RefAdapter")
    prompt["sem"]["inputs"]["weights"] = "cat.safetensors"
    result, _ = run(prompt)
    assert result.texts["sem"].endswith("SemInpainter and RefAdapter")


def test_a_checkpoint_in_a_subfolder(prompt, run, server):
    info = server.get("/object_info/CATLoadCheckpoint")["CATLoadCheckpoint"]
    names = info["input"]["required"]["checkpoint"][1]["options"]
    in_subfolder = next(name for name in names if "sub" in name)
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = in_subfolder
    run(prompt)


def test_an_official_pickled_checkpoint(prompt, run):
    prompt.inputs("CATLoadCheckpoint")["checkpoint"] = "lightning.ckpt"
    assert run(prompt)[1].isfinite().all()


def add_lora(prompt, model):
    """The tiny LoRA on a model."""
    return prompt.add(
        "lora",
        "LoraLoaderModelOnly",
        model=model,
        lora_name="tiny.safetensors",
        strength_model=1.0,
    )


def test_lora_controlnet_and_two_adapters_on_one_model(prompt, run):
    _, plain = run(prompt)

    prompt.inputs("CATApplyRefAdapter")["model"] = add_lora(prompt, ["1", 0])
    _, with_lora = run(prompt)

    prompt.add(
        "controlled",
        "ControlNetApplyAdvanced",
        positive=["9", 0],
        negative=["9", 1],
        control_net=prompt.add("control", "HelperControlNet", demo=False),
        image=["5", 0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        vae=["1", 2],
    )
    prompt.inputs("KSampler").update(positive=["controlled", 0], negative=["controlled", 1])
    _, with_control = run(prompt)

    reference = prompt.add(
        "reference", "CATEncodeVisualPrompt", clip_vision=["1", 3], image=["2", 0]
    )
    prompt.inputs("KSampler")["model"] = prompt.add(
        "second",
        "CATApplyRefAdapter",
        model=["8", 0],
        cat_model=["1", 4],
        visual_prompt=reference,
        strength=0.7,
        start_percent=0.2,
        end_percent=0.9,
    )
    _, with_two = run(prompt)

    latents = [plain, with_lora, with_control, with_two]
    assert all(latent.isfinite().all() for latent in latents)
    for one, other in itertools.combinations(latents, 2):
        assert not torch.equal(one, other)


def test_the_lora_still_applies_after_the_adapter(prompt, run):
    """The other order: LoRA behind Apply RefAdapter."""
    _, plain = run(prompt)
    prompt.inputs("KSampler")["model"] = add_lora(prompt, ["8", 0])
    assert not torch.equal(run(prompt)[1], plain)


def test_the_features_go_on_to_a_stock_node(prompt, run):
    """The stock U-Net of SD 1.5 does not read them, so the picture stays as it was."""
    _, plain = run(prompt)
    output = prompt.add(
        "output",
        "CATVisualPromptToClipVision",
        visual_prompt=["4", 0],
        clip_vision=["1", 3],
    )
    prompt.inputs("KSampler")["positive"] = prompt.add(
        "unclip",
        "unCLIPConditioning",
        conditioning=["9", 0],
        clip_vision_output=output,
        strength=1.0,
        noise_augmentation=0.0,
    )
    result, latent = run(prompt)
    assert torch.equal(latent, plain)
    assert {"output", "unclip"} <= set(result.seconds)
    assert "no projection" in result.texts["output"]


def test_the_official_schedule_through_sampler_custom(prompt, run):
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
        sigmas=prompt.add("sigmas", "CATScheduler", model=["8", 0], steps=4, denoise=1.0),
        latent_image=["9", 2],
    )
    assert run(prompt)[1].isfinite().all()


# Pictures and masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("images, masks", [(3, 1), (1, 3), (2, 2)])
def test_batches_of_photos_and_masks(prompt, run, images, masks):
    image = prompt.add("images", "RepeatImageBatch", image=["2", 0], amount=images)
    as_image = prompt.add("mask image", "MaskToImage", mask=["2", 1])
    repeated = prompt.add("masks image", "RepeatImageBatch", image=as_image, amount=masks)
    mask = prompt.add("masks", "ImageToMask", image=repeated, channel="red")
    for name in CAT_NODES:
        prompt.inputs(name).update(image=image, mask=mask)
    _, latent = run(prompt)
    assert len(latent) == max(images, masks)


def test_a_mask_of_another_size(prompt, run):
    mask = prompt.add("solid", "SolidMask", value=1.0, width=33, height=17)
    for name in CAT_NODES:
        prompt.inputs(name)["mask"] = mask
    result, _ = run(prompt)
    assert "covers everything" in result.texts["4"]


def test_an_empty_mask_is_said_and_goes_on(prompt, run):
    prompt.inputs("CATSamplePhoto")["image"] = "opaque.png"
    result, _ = run(prompt)
    sentence = "The mask is empty. Paint it white where the object goes."
    assert result.texts["4"].startswith(sentence)
    prompt.inputs("CATSamplePhoto")["image"] = "photo.png"
    result, _ = run(prompt)
    assert "4" not in result.texts


def test_features_are_compared_on_the_node(prompt, run, picture):
    prompt.add("compare", "CATCompareFeatures", **prompt.inputs("CATSemanticInpaint"))
    prompt.add("observed", "PreviewAny", source=["compare", 0])
    prompt.add("predicted", "PreviewAny", source=["compare", 1])
    prompt.add("plot", "PreviewImage", images=["compare", 2])
    with_progress = []

    def note(kind, data):
        if kind == "progress":
            with_progress.append(data["node"])

    result, _ = run(prompt, on_event=note)
    observed = float(result.outputs["observed"]["text"][0])
    predicted = float(result.outputs["predicted"]["text"][0])
    assert -1 < predicted < observed < 1  # a random SemInpainter is worse than none
    numbers = f"in the hole: observed {observed:.3f}, predicted {predicted:.3f} ("
    assert numbers in result.texts["compare"]
    histogram = picture(result, "compare")
    assert histogram.shape == (320, 640, 3)
    assert (picture(result, "plot") == histogram).all()
    assert "compare" in with_progress


@pytest.mark.parametrize("photo, context", [("large.png", 1.0), ("odd.png", 8.0)])
def test_a_crop_is_drawn_and_put_back(prompt, run, server, base, photo, context):
    """A square scaled down, and the largest of a photo that is no multiple of 8."""
    prompt.inputs("CATSamplePhoto")["image"] = photo
    prompt.add(
        "crop",
        "CATCropAroundMask",
        image=["2", 0],
        mask=["2", 1],
        size=64,
        context=context,
    )
    for name in CAT_NODES:
        prompt.inputs(name).update(image=["crop", 0], mask=["crop", 1])
    variations = prompt.add("two", "RepeatLatentBatch", samples=["9", 2], amount=2)
    prompt.inputs("KSampler")["latent_image"] = variations
    stitched = prompt.add("stitch", "CATStitch", crop=["crop", 2], image=["11", 0], soft_edge=0)
    prompt.inputs("SaveImage")["images"] = stitched
    result, latent = run(prompt)
    assert latent.shape == (2, 4, 8, 8)

    original = np.asarray(Image.open(base / "input" / photo)).astype(int)
    outside = original[..., 3] == 255
    inside = original[..., 3] == 0
    pictures = []
    for saved in result.outputs["17"]["images"]:
        pictures.append(np.asarray(Image.open(server.image_path(saved))).astype(int))
    assert len(pictures) == 2
    for picture in pictures:
        assert (picture[outside] == original[outside, :3]).all()
        assert (picture[inside] != original[inside, :3]).any()
    assert (pictures[0][inside] != pictures[1][inside]).any()


def test_an_empty_mask_is_said_on_the_crop(prompt, run):
    prompt.inputs("CATSamplePhoto")["image"] = "opaque.png"
    prompt.add("crop", "CATCropAroundMask", image=["2", 0], mask=["2", 1], size=64, context=1.5)
    prompt.inputs("CATSemanticInpaint").update(image=["crop", 0], mask=["crop", 1])
    result, _ = run(prompt)
    assert result.texts["crop"].startswith("The mask is empty: the square is the middle")


def test_an_image_with_alpha_is_taken_as_rgb(prompt, run):
    _, plain = run(prompt)
    alpha = prompt.add("alpha", "JoinImageWithAlpha", image=["2", 0], alpha=["2", 1])
    prompt.inputs("CATSemanticInpaint")["image"] = alpha
    assert torch.equal(run(prompt)[1], plain)


def test_colours_out_of_range_are_clipped(prompt, run):
    bright = prompt.add("bright", "HelperImage", kind="bright")
    for name in CAT_NODES:
        prompt.inputs(name)["image"] = bright
    assert run(prompt)[1].isfinite().all()


def test_the_visual_prompt_of_a_one_pixel_photo(prompt, run):
    dot = prompt.add("dot", "EmptyImage", width=1, height=1, batch_size=1, color=0)
    prompt.inputs("CATSemanticInpaint")["image"] = dot
    assert run(prompt)[1].isfinite().all()


# Cancel ---------------------------------------------------------------------------------------


def interrupt(server):
    """From another thread: this one waits for the prompt to end."""
    threading.Thread(target=server.post, args=("/interrupt",)).start()


def test_cancel_stops_the_sampler_and_the_next_run_works(server, prompt, run):
    _, latent = run(prompt)
    prompt.inputs("KSampler")["steps"] = 1000
    steps = []  # that were done

    def cancel(kind, data):
        if kind == "progress" and data["max"] > 900:
            if not steps:
                interrupt(server)
            steps.append(data["value"])

    assert server.run(prompt, cancel).interrupted
    assert 0 < steps[-1] < 500
    prompt.inputs("KSampler").update(steps=2, seed=0)
    assert torch.equal(run(prompt)[1], latent)


def test_cancel_stops_a_long_batch_in_semantic_inpaint(server, prompt):
    many = prompt.add("many", "RepeatImageBatch", image=["2", 0], amount=2000)
    prompt.inputs("CATSemanticInpaint")["image"] = many
    shares = []  # of the batch that were done

    def cancel(kind, data):
        if kind == "progress" and data.get("node") == "4":
            if not shares:
                interrupt(server)
            shares.append(data["value"] / data["max"])

    assert server.run(prompt, cancel).interrupted
    assert max(shares) < 0.9  # it did not run to its end
