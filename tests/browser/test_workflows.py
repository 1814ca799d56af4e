"""The example workflows, dropped onto the canvas; the demo also runs."""

import copy
import json

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from cat_diffusion.cat_core import preprocess

from .conftest import WORKFLOWS

DEMO = ROOT / "workflows/cat_demo.json"
NO_FILES = {"cat_demo", "cat_two_objects"}  # they run as they open


@pytest.fixture(scope="module")
def demo():
    return json.loads(DEMO.read_text())


@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_opens_readable_on_a_small_screen(canvas, path, renderer):
    canvas.page.set_viewport_size({"width": 1440, "height": 900})
    workflow = json.loads(path.read_text())
    canvas.drop(path.name, workflow)
    canvas.render(renderer)
    # Again, for what it is fitted to are the nodes as this renderer knows them.
    canvas.drop(path.name, workflow)
    problems = canvas.problems() if renderer == "nodes2" else set()
    canvas.screenshot(f"workflow_{path.stem}_{renderer}")
    assert canvas.run("app.canvas.ds.scale") >= 0.7
    assert problems <= (set() if path.stem in NO_FILES else {"missing-model"})
    assert overlapping(canvas) == []
    titles = canvas.run("app.graph.groups.map(({title}) => title)")
    assert [title for title in titles if title[0] == "1"]


def test_a_workflow_with_something_missing_is_noticed(canvas, demo):
    broken = copy.deepcopy(demo)
    loader = node_of(broken, "CATLoadCheckpoint")
    loader["widgets_values"][0] = "not_there.safetensors"
    loader["properties"]["models"] = [
        {
            "name": "not_there.safetensors",
            "directory": "cat_diffusion",
            "url": "https://huggingface.co/a/b/resolve/main/not_there.safetensors",
        }
    ]
    node_of(broken, "KSampler")["type"] = "CATNotThere"
    canvas.drop("broken.json", broken)
    assert {"missing-node", "missing-model"} <= canvas.problems()


# Another text each time: where nothing is new, nothing is shown.
@pytest.mark.parametrize("renderer, text", [("classic", "red star"), ("nodes2", "red heart")])
def test_demo_runs(canvas, demo, renderer, text, server):
    demo = copy.deepcopy(demo)
    node_of(demo, "PrimitiveString")["widgets_values"] = [text]
    canvas.drop(DEMO.name, demo)
    canvas.render(renderer)
    canvas.queue()
    for kind in ("CATSemanticInpaint", "SaveImage"):
        id = node_of(demo, kind)["id"]
        image = canvas.run("(id) => app.nodeOutputs[id].images[0]", id)
        if renderer == "classic":
            canvas.until("(id) => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth > 0", id)
        else:
            canvas.until(
                """(name) => {
                const shows = ({src, naturalWidth}) => src.includes(name) && naturalWidth > 0;
                return [...document.images].some(shows);
            }""",
                image["filename"],
            )
    canvas.screenshot(f"demo_{renderer}")
    assert overlapping(canvas) == []

    scene, hole = scene_of(demo)
    picture = np.asarray(Image.open(server.image_path(image)).convert("RGB")).astype(int)
    assert (picture[~hole] == scene[~hole]).all()
    inside = picture[hole]
    red = (inside[:, 0] > 150) & (inside[:, 1] < 110) & (inside[:, 2] < 110)
    assert red.mean() > 0.1  # what the text asks for is red
    assert (inside != scene[hole]).any(axis=1).mean() > 0.9


def test_grid_shows_the_cells_of_a_run_where_the_mask_is_no_file(canvas, demo):
    canvas.drop(DEMO.name, demo)
    canvas.run("""() => {
        const first = (type) => app.graph.nodes.find((node) => node.type === type);
        const scene = first("CATDemoScene");
        const inpaint = first("CATSemanticInpaint");
        const sampler = first("KSampler");
        sampler.widgets.find(({name}) => name === "steps").value = 1;
        const invert = LiteGraph.createNode("InvertMask");
        app.graph.add(invert);
        scene.connect(1, invert, 0);
        invert.connect(0, inpaint, inpaint.findInputSlot("mask"));
    }""")
    canvas.until("() => document.querySelector('.cat-cells').innerText.includes('after a run')")
    canvas.queue()
    outside = torch.from_numpy(~scene_of(demo)[1]).float()[None, None]
    seen = preprocess.clip_input(torch.zeros(1, 3, 8, 8), outside)
    cells = "".join(map(str, seen.patch_mask.flatten().tolist()))
    canvas.until("(cells) => document.querySelector('.cat-cells').dataset.cells === cells", cells)
    assert f"In the last run the mask covered {cells.count('1')} of 256" in canvas.run(
        "document.querySelector('.cat-cells').innerText"
    )


def node_of(workflow, kind):
    """The first node of a class."""
    return next(node for node in workflow["nodes"] if node["type"] == kind)


def scene_of(workflow):
    """The demo's picture (H, W, 3) and its hole (H, W)."""
    name = node_of(workflow, "CATDemoScene")["widgets_values"][0]
    scene = np.asarray(Image.open(ROOT / "web/scenes" / f"{name}.png").convert("RGBA")).astype(int)
    return scene[..., :3], scene[..., 3] < 255


def overlapping(canvas):
    """Pairs of nodes that lie over each other.

    Of collapsed ones the title counts: what Nodes 2.0 says of a missing file below it lies behind
    the next node.
    """
    return canvas.run("""() => {
        const boxes = app.graph.nodes.map((node) => {
            const [x, y, width, height] = node.getBounding();
            return [node.title, x, y, width, node.flags.collapsed ? 30 : height];
        });
        const over = ([, x, y, w, h], [, a, b, c, d]) =>
            x < a + c && a < x + w && y < b + d && b < y + h;
        return boxes.flatMap((one, i) => {
            const others = boxes.slice(i + 1).filter((two) => over(one, two));
            return others.map((two) => [one[0], two[0]]);
        });
    }""")
