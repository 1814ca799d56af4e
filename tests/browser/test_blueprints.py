"""The blueprints: found by search as a user does, put onto the canvas, and run."""

import numpy as np
import pytest
from paths import ROOT
from PIL import Image, ImageFilter

from release.blueprints import ALL

# The demo model's outputs in place of each loader's.
LOADERS = {"CheckpointLoaderSimple": [0, 1, 2], "CLIPVisionLoader": [3], "CATLoadWeights": [4]}
SOFT_EDGE = 8  # pixels, of the blueprint's CATStitch
# A scene goes in and a picture comes out; what a user chooses is chosen on the blueprint's node.
AROUND = """(chosen) => {
    const blueprint = app.graph.nodes.find((node) => node.isSubgraphNode());
    const [scene, save] = ["CATDemoScene", "SaveImage"].map((type) => LiteGraph.createNode(type));
    [scene, save].forEach((node) => app.graph.add(node));
    scene.pos = [-500, 0];
    save.pos = [700, 0];
    scene.widgets[0].value = "square hole";
    scene.connect(0, blueprint, blueprint.findInputSlot("image"));
    scene.connect(1, blueprint, blueprint.findInputSlot("mask"));
    blueprint.connect(0, save, 0);
    Object.entries(chosen).forEach(([name, value]) => {
        blueprint.widgets.find((widget) => widget.name === name).value = value;
    });
    return save.id;
}"""
# Inside, the demo model for the files that users bring; it draws squares of 128 pixels.
ON_DEMO = """(loaders) => {
    const {subgraph} = app.graph.nodes.find((node) => node.isSubgraphNode());
    const demo = LiteGraph.createNode("CATLoadCheckpoint");
    const readers = [];  // [output of the demo model, node, its input]
    for (const node of subgraph.nodes) {
        node.inputs.forEach(({link}, input) => {
            const {origin_id, origin_slot} = subgraph.getLink(link) ?? {};
            const outputs = loaders[subgraph.getNodeById(origin_id)?.type];
            if (outputs) readers.push([outputs[origin_slot], node, input]);
        });
    }
    subgraph.add(demo);
    demo.widgets[0].value = "cat_demo_model.safetensors";
    readers.forEach(([output, node, input]) => demo.connect(output, node, input));
    [...subgraph.nodes].filter(({type}) => loaders[type]).forEach((one) => subgraph.remove(one));
    const crop = subgraph.nodes.find(({type}) => type === "CATCropAroundMask");
    if (crop) crop.widgets.find(({name}) => name === "size").value = 128;
    return readers.length;
}"""
# The demo model's own sampling around the patched MODEL; (widgets, links) by name.
SAMPLED = """([nodes, links]) => {
    const made = {blueprint: app.graph.nodes.find((node) => node.isSubgraphNode())};
    Object.entries(nodes).forEach(([name, [type, values]], i) => {
        const node = (made[name] = LiteGraph.createNode(type));
        app.graph.add(node);
        node.pos = [400 * (i % 4) - 500, 500 + 300 * Math.floor(i / 4)];
        Object.entries(values).forEach(([widget, value]) => {
            node.widgets.find(({name}) => name === widget).value = value;
        });
    });
    links.forEach(([from, output, to, input]) =>
        made[from].connect(output, made[to], made[to].findInputSlot(input)));
    made.blueprint.widgets.find(({name}) => name === "text").value = "red star";
    return made.save.id;
}"""
SAMPLING = [
    {
        "demo": ("CATLoadCheckpoint", {"checkpoint": "cat_demo_model.safetensors"}),
        "scene": ("CATDemoScene", {"scene": "square hole"}),
        "positive": ("CLIPTextEncode", {"text": "red star"}),
        "negative": ("CLIPTextEncode", {"text": ""}),
        "inputs": ("CATInpaintConditioning", {"fill": "black"}),
        "sampler": ("KSampler", {"steps": 20, "cfg": 3.0, "sampler_name": "ddim"}),
        "decoded": ("VAEDecode", {}),
        "save": ("SaveImage", {}),
    },
    [
        ("demo", 0, "blueprint", "model"),
        ("demo", 1, "blueprint", "clip"),
        ("scene", 0, "blueprint", "image"),
        ("scene", 1, "blueprint", "mask"),
        ("demo", 1, "positive", "clip"),
        ("demo", 1, "negative", "clip"),
        ("positive", 0, "inputs", "positive"),
        ("negative", 0, "inputs", "negative"),
        ("demo", 2, "inputs", "vae"),
        ("scene", 0, "inputs", "image"),
        ("scene", 1, "inputs", "mask"),
        ("blueprint", 0, "sampler", "model"),
        ("inputs", 0, "sampler", "positive"),
        ("inputs", 1, "sampler", "negative"),
        ("inputs", 2, "sampler", "latent_image"),
        ("sampler", 0, "decoded", "samples"),
        ("demo", 2, "decoded", "vae"),
        ("decoded", 0, "save", "images"),
    ],
]


@pytest.fixture
def dropped(canvas):
    """Search for a blueprint and put it onto an empty canvas."""

    def drop(name):
        canvas.run("() => app.graph.clear()")
        canvas.page.set_viewport_size({"width": 1440, "height": 900})
        canvas.page.mouse.dblclick(500, 600)
        field = canvas.page.get_by_role("combobox").or_(canvas.page.get_by_role("textbox")).last
        field.wait_for()
        canvas.page.keyboard.type(name)
        canvas.page.wait_for_timeout(1500)  # the list is filtered a while after the last letter
        canvas.page.keyboard.press("Enter")
        canvas.page.wait_for_timeout(500)
        canvas.page.mouse.click(500, 300)  # where there is a ghost of the node, it is put down
        canvas.until("() => app.graph.nodes.length === 1")

    return drop


@pytest.mark.parametrize("name", ALL)
def test_is_found_and_dropped(canvas, dropped, name):
    dropped(name)
    assert canvas.run("app.graph.nodes[0].title") == name
    widgets = canvas.run("app.graph.nodes[0].widgets.map(({name}) => name)")
    assert {"text", "strength", "clip_name", "weights"} <= set(widgets)
    assert canvas.page.locator(".p-toast-message-error").count() == 0
    canvas.screenshot(f"blueprint_{name}")


def test_cat_inpaint_draws(canvas, dropped, server):
    dropped("CAT Inpaint")
    save = canvas.run(AROUND, {"text": "red star", "steps": 20})
    assert canvas.run(ON_DEMO, LOADERS) == 9
    canvas.queue()
    image = canvas.run("(id) => app.nodeOutputs[id].images[0]", save)
    canvas.screenshot("blueprint_ran")
    scene = np.asarray(Image.open(ROOT / "web/scenes/square hole.png").convert("RGBA")).astype(int)
    hole = scene[..., 3] < 255
    picture = np.asarray(Image.open(server.image_path(image)).convert("RGB")).astype(int)
    changed = (picture != scene[..., :3]).any(2)
    assert changed[hole].mean() > 0.9
    near = Image.fromarray(hole).convert("L").filter(ImageFilter.MaxFilter(2 * SOFT_EDGE + 1))
    assert not changed[np.asarray(near) == 0].any()
    red = (picture[..., 0] > 150) & (picture[..., 1] < 110) & (picture[..., 2] < 110)
    assert red[hole].mean() > 0.1


def test_cat_visual_prompt_patches_a_model(canvas, dropped, server):
    dropped("CAT Visual Prompt")
    save = canvas.run(SAMPLED, SAMPLING)
    assert canvas.run(ON_DEMO, LOADERS) == 3
    canvas.queue()
    image = canvas.run("(id) => app.nodeOutputs[id].images[0]", save)
    canvas.screenshot("blueprint_visual_prompt_ran")
    scene = Image.open(ROOT / "web/scenes/square hole.png").convert("RGBA")
    hole = np.asarray(scene)[..., 3] < 255
    picture = np.asarray(Image.open(server.image_path(image)).convert("RGB")).astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 110) & (picture[..., 2] < 110)
    assert red[hole].mean() > 0.1
