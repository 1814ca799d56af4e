"""The grid on CAT Semantic Inpaint: which of CLIP's cells the mask covers, before a run."""

import json

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image, ImageDraw, ImageOps

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.pictures.crop import crop_around_mask

RENDERERS = ["classic", "nodes2"]


@pytest.fixture(scope="module")
def pictures(base):
    """{name: mask in [0, 1]} of pictures in the input folder.

    They are a photo that is not square with a large hole, a small one and none.
    """
    photo = Image.open(ROOT / "web/photograph/photo.jpg").resize((450, 300))
    photo = photo.convert("L").convert("RGB")
    masks = {}
    for name, box in (
        ("large", (60, 40, 230, 220)),
        ("small", (210, 150, 222, 158)),
        ("none", None),
    ):
        hole = Image.new("L", photo.size)
        if box:
            ImageDraw.Draw(hole).ellipse(box, fill=255)
        photo.putalpha(ImageOps.invert(hole))
        photo.save(base / "input" / f"{name}_hole.png")
        hole.convert("RGB").save(base / "input" / f"{name}_mask.png")
        masks[name] = np.asarray(hole) / 255
    return masks


def expected(mask):
    """The cells that the node will mask, row by row."""
    black = torch.zeros(1, 3, 8, 8)
    seen = preprocess.clip_input(black, torch.from_numpy(mask)[None, None])
    return "".join(map(str, seen.patch_mask.flatten().tolist()))


def outside_alpha(path):
    """The mask in [0, 1] that LoadImage makes of a picture."""
    return 1 - np.asarray(Image.open(path).getchannel("A")) / 255


def shows(canvas, cells, words="", wrong=0):
    """Wait until the grid shows these cells, and a sentence with these words.

    `wrong` of the cells may be other ones.
    """
    canvas.until(
        """([cells, words, wrong]) => {
        const grid = document.querySelector(".cat-cells");
        const shown = grid?.dataset.cells ?? "";
        const others = [...shown].filter((cell, i) => cell !== cells[i]).length;
        return shown.length === cells.length && others <= wrong && grid.innerText.includes(words);
    }""",
        [cells, words, wrong],
    )


def photo_and_hole(canvas, name):
    canvas.build(
        {"photo": ["LoadImage", {"image": f"{name}_hole.png"}], "cat": ["CATSemanticInpaint", {}]},
        [["photo", 0, "cat", "image"], ["photo", 1, "cat", "mask"]],
    )


@pytest.mark.parametrize(
    "locale, small, none", [("zh", "遮罩太小", "没有覆盖"), ("en", "Too small", "No cell")]
)
def test_says_that_a_mask_is_too_small(canvas, pictures, locale, small, none):
    photo_and_hole(canvas, "small")
    canvas.render("nodes2")
    cells = expected(pictures["small"])
    assert 0 < cells.count("1") < 4
    shows(canvas, cells, small)
    canvas.screenshot(f"cells_small_{locale}")
    canvas.run("nodes.photo.widgets[0].value = 'none_hole.png'")
    shows(canvas, "0" * 256, none)


@pytest.mark.parametrize("palette", ["dark", "light"])
@pytest.mark.parametrize("renderer", RENDERERS)
def test_shows_the_cells_of_the_mask_in_both_renderers_and_palettes(
    canvas, pictures, renderer, palette
):
    photo_and_hole(canvas, "large")
    canvas.set("Comfy.ColorPalette", palette)
    canvas.render(renderer)
    cells = expected(pictures["large"])
    shows(canvas, cells, f"about {cells.count('1')} of 256 cells")
    canvas.screenshot(f"cells_{renderer}_{palette}")
    orange = canvas.run("""() => {
        const canvas = document.querySelector(".cat-cells canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4) {
            const [red, green, blue] = data.slice(i, i + 3);
            count += red > green + 40 && green > blue + 30;
        }
        return count / (data.length / 4);
    }""")
    assert orange == pytest.approx(cells.count("1") / 256, abs=0.06)
    assert canvas.page.locator(".cat-cells canvas").bounding_box()["height"] > 100
    assert canvas.page.locator(".cat-cells div").bounding_box()["height"] > 10


def test_follows_widgets_and_links(canvas, pictures):
    photo_and_hole(canvas, "small")
    shows(canvas, expected(pictures["small"]))
    canvas.run("nodes.photo.widgets[0].value = 'large_hole.png'")
    large = expected(pictures["large"])
    shows(canvas, large)
    canvas.run("nodes.cat.disconnectInput(nodes.cat.findInputSlot('mask'))")
    shows(canvas, "", "Connect a mask")
    canvas.build(
        {
            "mask": ["LoadImageMask", {"image": "large_mask.png", "channel": "red"}],
            "cat": ["CATSemanticInpaint", {}],
            "on": ["Reroute", {}],
            "other": ["InvertMask", {}],
        },
        [["mask", 0, "on", ""], ["on", 0, "cat", "mask"]],
    )
    shows(canvas, large)
    canvas.run("nodes.mask.connect(0, nodes.other, 0)")
    canvas.run("nodes.other.connect(0, nodes.cat, nodes.cat.findInputSlot('mask'))")
    shows(canvas, "", "another node")
    canvas.screenshot("cells_other")
    canvas.run("""() => {
        nodes.mask.connect(0, nodes.cat, nodes.cat.findInputSlot("mask"));
        nodes.mask.widgets[0].value = "gone.png";
    }""")
    shows(canvas, "", "cannot be read")
    assert len(canvas.errors) > 0
    assert all("gone.png" in error for error in canvas.errors)
    canvas.errors.clear()


@pytest.mark.parametrize("kind, size, context", [("large", 128, 1.5), ("small", 64, 2.0)])
def test_looks_through_a_crop(canvas, pictures, kind, size, context):
    canvas.build(
        {
            "photo": ["LoadImage", {"image": f"{kind}_hole.png"}],
            "crop": ["CATCropAroundMask", {"size": size, "context": context}],
            "scaled": ["ImageScaleBy", {"scale_by": 2.0}],
            "number": ["PrimitiveInt", {"value": size}],
            "cat": ["CATSemanticInpaint", {}],
        },
        [
            ["photo", 0, "crop", "image"],
            ["photo", 1, "crop", "mask"],
            ["crop", 0, "cat", "image"],
            ["crop", 1, "cat", "mask"],
        ],
    )
    mask = torch.from_numpy(pictures[kind]).float()[None, None]
    cropped = crop_around_mask(torch.zeros(1, 3, *mask.shape[2:]), mask, size, context)
    whole = expected(pictures[kind])
    square = expected(cropped.sized(size)[1][0, 0].numpy())
    assert whole.count("1") < square.count("1")
    shows(canvas, square, wrong=3)  # the browser scales once where the node scales twice
    canvas.screenshot(f"cells_crop_{kind}")
    canvas.run("""() => {
        nodes.photo.connect(0, nodes.scaled, 0);
        nodes.scaled.connect(0, nodes.crop, 0);
    }""")
    shows(canvas, "", "another node")  # of another size, the photo has another square
    canvas.run("nodes.photo.connect(0, nodes.crop, 0)")
    shows(canvas, square, wrong=3)
    canvas.run("nodes.number.connect(0, nodes.crop, nodes.crop.findInputSlot('size'))")
    shows(canvas, "", "another node")


def test_scenes_of_the_pack(canvas):
    for path in sorted((ROOT / "web/scenes").glob("*.png")):
        canvas.build(
            {"scene": ["CATDemoScene", {"scene": path.stem}], "cat": ["CATSemanticInpaint", {}]},
            [["scene", 0, "cat", "image"], ["scene", 1, "cat", "mask"]],
        )
        shows(canvas, expected(outside_alpha(path)))


def test_shows_what_the_mask_editor_paints(canvas, pictures, base):
    photo_and_hole(canvas, "none")
    canvas.render("nodes2")
    shows(canvas, "0" * 256)
    page = canvas.page
    page.get_by_test_id("node-title").filter(has_text="Load Image").click()
    page.get_by_label("Open Mask Editor for Selected Node").click()
    page.locator("#maskEditorCanvasContainer canvas").first.wait_for()
    page.wait_for_timeout(1000)  # the editor loads the picture
    page.mouse.move(650, 450)
    page.mouse.down()
    page.mouse.move(850, 600, steps=8)
    page.mouse.up()
    canvas.screenshot("mask_editor")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    canvas.until("() => nodes.photo.widgets[0].value.startsWith('clipspace')")
    name = canvas.run("nodes.photo.widgets[0].value").removesuffix(" [input]")
    painted = expected(outside_alpha(next(base.rglob(name))))
    assert painted.count("1") > 4
    shows(canvas, painted, wrong=2)


def test_lives_through_an_undo(canvas):
    """Undo makes all nodes anew, under the ids that they had."""
    canvas.drop("cat_demo.json", json.loads((ROOT / "workflows/cat_demo.json").read_text()))
    canvas.render("nodes2")
    canvas.page.get_by_test_id("node-title").filter(has_text="KSampler").click()
    canvas.run("window.before = app.graph.nodes.find(({type}) => type === 'CATSemanticInpaint')")
    canvas.page.keyboard.press("Control+b")
    canvas.until("() => app.graph.nodes.some(({mode}) => mode === 4)")
    canvas.page.keyboard.press("Control+z")
    canvas.until("""() => {
        const now = app.graph.nodes.find(({type}) => type === "CATSemanticInpaint");
        const grid = now?.widgets.at(-1).element;
        return now && now !== before && grid.isConnected && grid.innerText;
    }""")


def test_saved_workflows_stay_as_they_were(canvas):
    """The grid keeps out of widgets_values and of the prompt."""
    workflow = json.loads((ROOT / "workflows/cat_demo.json").read_text())
    canvas.drop("cat_demo.json", workflow)
    state = """async () => {
        const values = ({id, widgets_values}) => [id, widgets_values ?? []];
        return [app.graph.serialize().nodes.map(values), (await app.graphToPrompt()).output];
    }"""
    with_grid = canvas.run(state)
    removed = canvas.run("""() => {
        const node = app.graph.nodes.find(({type}) => type === "CATSemanticInpaint");
        const grid = node.widgets.find(({name}) => name === "masked_cells");
        return node.widgets.splice(node.widgets.indexOf(grid), 1).length;
    }""")
    assert removed == 1
    assert with_grid == canvas.run(state)
    saved = [[node["id"], node.get("widgets_values", [])] for node in workflow["nodes"]]
    assert sorted(with_grid[0]) == sorted(saved)
