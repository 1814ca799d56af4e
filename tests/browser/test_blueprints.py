"""The blueprints: found by search as a user does, put onto the canvas, and run."""

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from release.blueprints import ALL

LOADERS = {"CheckpointLoaderSimple": [0, 1, 2], "CLIPVisionLoader": [3], "CATLoadWeights": [4]}
# Inside the blueprint, the demo model for the files that users bring.
ON_DEMO = """([loaders]) => {
    const inside = app.graph.nodes.find((node) => node.isSubgraphNode()).subgraph;
    const demo = LiteGraph.createNode("CATLoadCheckpoint");
    inside.add(demo);
    demo.widgets[0].value = "cat_demo_model.safetensors";
    for (const loader of [...inside.nodes].filter(({type}) => loaders[type])) {
        loader.outputs.forEach(({links}, output) => [...(links ?? [])].forEach((id) => {
            const {target_id, target_slot} = inside.getLink(id);
            demo.connect(loaders[loader.type][output], inside.getNodeById(target_id), target_slot);
        }));
        inside.remove(loader);
    }
    const set = (type, values) => {
        const {widgets} = inside.nodes.find((node) => node.type === type) ?? {widgets: []};
        widgets.forEach((widget) => (widget.value = values[widget.name] ?? widget.value));
    };
    set("CATCropAroundMask", {size: 128});
    set("CATStitch", {soft_edge: 0});
    set("KSampler", {cfg: 3});
}"""
AROUND = """([steps]) => {
    const outer = app.graph.nodes.find((node) => node.isSubgraphNode());
    const [scene, save] = ["CATDemoScene", "SaveImage"].map((type) => LiteGraph.createNode(type));
    [scene, save].forEach((node) => app.graph.add(node));
    scene.pos = [-500, 0];
    save.pos = [700, 0];
    scene.widgets[0].value = "square hole";
    scene.connect(0, outer, outer.findInputSlot("image"));
    scene.connect(1, outer, outer.findInputSlot("mask"));
    outer.connect(0, save, 0);
    const set = (name, value) => (outer.widgets.find((one) => one.name === name).value = value);
    set("text", "red star");
    set("steps", steps);
    return save.id;
}"""


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


def test_cat_inpaint_runs(canvas, dropped, server):
    dropped("CAT Inpaint")
    save = canvas.run(AROUND, [20])
    canvas.run(ON_DEMO, [LOADERS])
    canvas.queue()
    image = canvas.run("(id) => app.nodeOutputs[id].images[0]", save)
    canvas.screenshot("blueprint_ran")
    scene = np.asarray(Image.open(ROOT / "web/scenes/square hole.png").convert("RGBA")).astype(int)
    hole = scene[..., 3] < 255
    picture = np.asarray(Image.open(server.image_path(image)).convert("RGB")).astype(int)
    assert (picture[~hole] == scene[..., :3][~hole]).all()
    red = (picture[..., 0] > 150) & (picture[..., 1] < 110) & (picture[..., 2] < 110)
    assert red[hole].mean() > 0.1
