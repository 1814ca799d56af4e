"""The grid on CAT Semantic Inpaint: which of CLIP's cells the mask covers, before a run."""

import json

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image, ImageDraw

RENDERERS = ["classic", "nodes2"]


@pytest.fixture(scope="module")
def pictures(base):
    """{name: mask in [0, 1]} of pictures in the input folder: a large hole in a photo that is not square, a small one, none."""
    photo = Image.open(ROOT / "tools/demo/photo.jpg").resize((450, 300))
    masks = {}
    for name, box in (("large.png", (60, 40, 230, 220)), ("small.png", (210, 150, 222, 158)), ("none.png", None)):
        hole = Image.new("L", photo.size)
        if box:
            ImageDraw.Draw(hole).ellipse(box, fill=255)
        photo.putalpha(Image.eval(hole, lambda value: 255 - value))
        (base / "input/sub").mkdir(exist_ok=True)
        photo.save(base / "input/sub" / name)
        hole.convert("RGB").save(base / "input" / f"red_{name}")
        masks[name] = np.asarray(hole) / 255
    return masks


def expected(mask):
    """The cells that the node will mask, row by row."""
    from cat_core import preprocess

    mask = torch.from_numpy(mask)[None, None]
    return "".join(map(str, preprocess.clip_input(torch.zeros(1, 3, 8, 8), mask).patch_mask.flatten().tolist()))


def shows(canvas, cells, words=""):
    """Wait until the grid shows these cells and a sentence with these words."""
    canvas.until("""([cells, words]) => {
        const grid = document.querySelector(".cat-cells");
        return grid?.dataset.cells === cells && grid.innerText.includes(words);
    }""", [cells, words])


def photo_and_hole(canvas, name):
    canvas.build({"photo": ["LoadImage", {"image": f"sub/{name} [input]"}], "cat": ["CATSemanticInpaint", {}]},
                 [["photo", 0, "cat", "image"], ["photo", 1, "cat", "mask"]])


@pytest.mark.parametrize("palette", ["dark", "light"])
@pytest.mark.parametrize("renderer", RENDERERS)
def test_shows_the_cells_of_the_mask_in_both_renderers_and_palettes(canvas, pictures, renderer, palette):
    photo_and_hole(canvas, "large.png")
    canvas.set("Comfy.ColorPalette", palette)
    canvas.render(renderer)
    cells = expected(pictures["large.png"])
    shows(canvas, cells, f"about {cells.count('1')} of 256 cells")
    canvas.screenshot(f"cells_{renderer}_{palette}")
    orange = canvas.run("""() => {
        const canvas = document.querySelector(".cat-cells canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += data[i] > data[i + 1] + 40 && data[i + 1] > data[i + 2] + 30;
        return count / (data.length / 4);
    }""")
    assert orange == pytest.approx(cells.count("1") / 256, abs=0.06)
    box, label = (canvas.page.locator(place).bounding_box() for place in (".cat-cells canvas", ".cat-cells div"))
    assert box["height"] > 100 and label["height"] > 10


@pytest.mark.parametrize("locale, small, none", [("en", "Too small", "No cell"), ("zh", "遮罩太小", "没有覆盖")])
def test_says_that_a_mask_is_too_small(canvas, pictures, locale, small, none):
    photo_and_hole(canvas, "small.png")
    canvas.render("nodes2")
    cells = expected(pictures["small.png"])
    assert 0 < cells.count("1") < 4
    shows(canvas, cells, small)
    canvas.screenshot(f"cells_small_{locale}")
    canvas.run("nodes.photo.widgets[0].value = 'sub/none.png'")
    shows(canvas, "0" * 256, none)


def test_follows_widgets_and_links(canvas, pictures):
    photo_and_hole(canvas, "small.png")
    shows(canvas, expected(pictures["small.png"]))
    canvas.run("nodes.photo.widgets[0].value = 'sub/large.png'")
    large = expected(pictures["large.png"])
    shows(canvas, large)
    canvas.run("nodes.cat.disconnectInput(nodes.cat.findInputSlot('mask'))")
    shows(canvas, "", "Connect a mask")
    canvas.build({"mask": ["LoadImageMask", {"image": "red_large.png", "channel": "red"}], "cat": ["CATSemanticInpaint", {}],
                  "on": ["Reroute", {}], "other": ["InvertMask", {}]}, [["mask", 0, "on", ""], ["on", 0, "cat", "mask"]])
    shows(canvas, large)
    canvas.run("nodes.mask.connect(0, nodes.other, 0); nodes.other.connect(0, nodes.cat, nodes.cat.findInputSlot('mask'))")
    shows(canvas, "", "another node")
    canvas.screenshot("cells_other")
    canvas.run("nodes.mask.connect(0, nodes.cat, nodes.cat.findInputSlot('mask')); nodes.mask.widgets[0].value = 'gone.png'")
    shows(canvas, "", "cannot be read")
    assert len(canvas.errors) > 0 and all("gone.png" in error for error in canvas.errors)
    canvas.errors.clear()


def test_scenes_of_the_pack(canvas):
    for path in sorted((ROOT / "web/scenes").glob("*.png")):
        canvas.build({"scene": ["CATDemoScene", {"scene": path.stem}], "cat": ["CATSemanticInpaint", {}]},
                     [["scene", 0, "cat", "image"], ["scene", 1, "cat", "mask"]])
        shows(canvas, expected(1 - np.asarray(Image.open(path).getchannel("A")) / 255))


def test_shows_what_the_mask_editor_paints(canvas, pictures):
    photo_and_hole(canvas, "none.png")
    canvas.render("nodes2")
    shows(canvas, "0" * 256)
    canvas.page.get_by_test_id("node-title").filter(has_text="Load Image").click()
    canvas.page.get_by_label("Open in Mask Editor").click()
    canvas.page.wait_for_timeout(1500)
    canvas.screenshot("mask_editor")


def test_saved_workflows_stay_as_they_were(canvas, open_canvas):
    """The grid keeps out of widgets_values and of the prompt."""
    workflow = json.loads((ROOT / "workflows/cat_demo.json").read_text())

    def saved(canvas):
        canvas.drop("cat_demo.json", workflow)
        grids = canvas.run("document.querySelectorAll('.cat-cells').length")
        return grids, *canvas.run("""async () => [
            app.graph.serialize().nodes.map((node) => [node.id, node.widgets_values]), (await app.graphToPrompt()).output]""")

    grids, *with_grid = saved(canvas)
    assert grids == 1
    without = open_canvas(block="**/masked_cells.js")
    grids, *without_grid = saved(without)
    without.page.close()
    assert grids == 0
    assert with_grid == without_grid
