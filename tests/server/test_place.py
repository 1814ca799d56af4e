"""Where the object goes: into the hole, whatever the photo's size, and nothing else changes."""

import numpy as np
import pytest
from PIL import Image


def photo(base, name):
    """(RGB, alpha) as integers."""
    rgba = np.asarray(Image.open(base / "input" / name)).astype(int)
    return rgba[..., :3], rgba[..., 3]


@pytest.mark.parametrize("name", ["photo.png", "odd.png", "large.png"])
def test_the_example_workflow_changes_the_hole_and_nothing_else(base, prompt, run, picture, name):
    prompt.inputs("CATSamplePhoto")["image"] = name
    result, _ = run(prompt)
    made = picture(result)
    original, alpha = photo(base, name)
    assert made.shape == original.shape
    assert (made[alpha == 255] == original[alpha == 255]).all()
    assert np.abs(made[alpha == 0] - original[alpha == 0]).mean() > 5


def red_star(example, width, height, left, top):
    """The example workflow on the demo model: a red star into a hole of a drawn scene.

    The scene has that size; the hole is 3/8 of it.
    """
    scene = example.add("scene", "CATDemoScene", scene="square hole")
    size = {"width": width, "height": height}
    image = example.add(
        "image", "ImageScale", image=scene, upscale_method="bilinear", crop="disabled", **size
    )
    nothing = example.add("nothing", "SolidMask", value=0.0, **size)
    box = example.add("box", "SolidMask", value=1.0, width=width * 3 // 8, height=height * 3 // 8)
    mask = example.add(
        "hole",
        "MaskComposite",
        destination=nothing,
        source=box,
        x=left,
        y=top,
        operation="add",
    )
    del example["2"]  # Load Image
    example.relink(["2", 0], image)
    example.relink(["2", 1], mask)
    example.inputs("CATLoadCheckpoint")["checkpoint"] = "cat_demo_model.safetensors"
    example.inputs("PrimitiveString")["value"] = "red star"
    example.inputs("ImageScaleToTotalPixels")["megapixels"] = 128 * 128 / 1024**2
    example.inputs("KSampler")["steps"] = 10
    example.add("original", "SaveImage", images=image, filename_prefix="original")
    example.add("sampled", "SaveImage", images=["11", 0], filename_prefix="sampled")
    return example


@pytest.mark.parametrize("corner", ["upper left", "lower right"])
@pytest.mark.parametrize("width, height", [(128, 128), (192, 128), (101, 150)])
def test_the_object_lands_where_the_hole_is(example, run, picture, width, height, corner):
    """On the demo model, which draws what it is asked for; its scene has nothing else in red."""
    hole_width = width * 3 // 8
    hole_height = height * 3 // 8
    left = width // 16
    top = height // 16
    if corner == "lower right":
        left = width - left - hole_width
        top = height - top - hole_height
    result, _ = run(red_star(example, width, height, left, top))
    original = picture(result, "original")
    made = picture(result)
    hole = np.zeros((height, width), bool)
    hole[top : top + hole_height, left : left + hole_width] = True

    assert made.shape == original.shape
    assert (made[~hole] == original[~hole]).all()
    assert np.abs(made[hole] - original[hole]).mean() > 20
    assert not reddish(original).any()
    # Also in what was sampled, before it is pasted into the hole, whatever size that has.
    for star in (reddish(made), reddish(picture(result, "sampled"))):
        y, x = np.nonzero(star)
        assert len(x) > 0.1 * hole.mean() * star.size  # it fills a good part of the hole
        centre_x = (x.mean() + 0.5) / star.shape[1] * width
        centre_y = (y.mean() + 0.5) / star.shape[0] * height
        assert abs(centre_x - (left + hole_width / 2)) < hole_width / 6
        assert abs(centre_y - (top + hole_height / 2)) < hole_height / 6


def reddish(pixels):
    """Where a picture is plainly red, (H, W)."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    return (red > 150) & (green < 80) & (blue < 80)


@pytest.mark.parametrize("width, height", [(4000, 3000), (1920, 1080), (75, 101), (768, 1024)])
def test_a_photo_is_scaled_whole(prompt, run, picture, width, height):
    """Nothing is cropped on the way; a crop would be stretched over the photo in the end."""
    size = {"width": width, "height": height}
    image = prompt.add("sized", "EmptyImage", batch_size=1, color=255, **size)
    prompt.inputs("ImageScaleToTotalPixels")["image"] = image
    for number in set(prompt) - {"5", "sized"}:
        del prompt[number]
    prompt.add("save", "SaveImage", images=["5", 0], filename_prefix="scaled")
    result, _ = run(prompt)
    scaled = picture(result, "save")
    assert scaled.shape[0] % 8 == 0
    assert scaled.shape[1] % 8 == 0
    assert abs(scaled.shape[1] / scaled.shape[0] / (width / height) - 1) < 0.1
