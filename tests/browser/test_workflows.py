"""The example workflows, dropped onto the canvas; the demo also runs."""

import copy
import json

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from .conftest import WORKFLOWS

DEMO = ROOT / "workflows/cat_demo.json"


@pytest.fixture(scope="module")
def demo():
    return json.loads(DEMO.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_opens(canvas, path):
    workflow = json.loads(path.read_text())
    canvas.drop(path.name, workflow)
    canvas.render("nodes2")
    problems = canvas.problems()
    canvas.screenshot(f"workflow_{path.stem}")
    assert problems <= (set() if path == DEMO else {"missing-model"})
    assert overlapping(canvas) == []


def test_a_workflow_with_something_missing_is_noticed(canvas, demo):
    broken = copy.deepcopy(demo)
    first, second = (node for node in broken["nodes"] if node["type"] in ("CATLoadCheckpoint", "KSampler"))
    first["widgets_values"][0] = "not_there.safetensors"
    first["properties"]["models"] = [{"name": "not_there.safetensors", "directory": "cat_diffusion",
                                      "url": "https://huggingface.co/a/b/resolve/main/not_there.safetensors"}]
    second["type"] = "CATNotThere"
    canvas.drop("broken.json", broken)
    assert {"missing-node", "missing-model"} <= canvas.problems()


@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
def test_demo_runs(canvas, demo, renderer, server):
    canvas.drop(DEMO.name, demo)
    canvas.render(renderer)
    canvas.queue()
    shown = {node["type"]: node["id"] for node in demo["nodes"]}
    for kind in ("CATSemanticInpaint", "SaveImage"):
        image = canvas.run("(id) => app.nodeOutputs[id].images[0]", shown[kind])
        if renderer == "classic":
            canvas.until("(id) => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth > 0", shown[kind])
        else:
            canvas.until("(name) => [...document.images].some(({src, naturalWidth}) => src.includes(name) && naturalWidth > 0)",
                         image["filename"])
    canvas.screenshot(f"demo_{renderer}")
    assert overlapping(canvas) == []

    scene, hole = scene_of(demo)
    picture = np.asarray(Image.open(server.image_path(image)).convert("RGB")).astype(int)
    assert (picture[~hole] == scene[~hole]).all()
    inside = picture[hole]
    red = (inside[:, 0] > 150) & (inside[:, 1] < 110) & (inside[:, 2] < 110)
    assert red.mean() > 0.1  # the red star that the demo asks for
    assert (inside != scene[hole]).any(axis=1).mean() > 0.9


def scene_of(workflow):
    """The demo's picture (H, W, 3) and its hole (H, W)."""
    name = next(node for node in workflow["nodes"] if node["type"] == "CATDemoScene")["widgets_values"][0]
    scene = np.asarray(Image.open(ROOT / "web/scenes" / f"{name}.png").convert("RGBA")).astype(int)
    return scene[..., :3], scene[..., 3] < 255


def overlapping(canvas):
    """Pairs of nodes that lie over each other."""
    return canvas.run("""() => {
        const boxes = app.graph.nodes.map((node) => [node.title, ...node.getBounding()]);
        const over = ([, x, y, w, h], [, a, b, c, d]) => x < a + c && a < x + w && y < b + d && b < y + h;
        return boxes.flatMap((one, i) => boxes.slice(i + 1).filter((two) => over(one, two)).map((two) => [one[0], two[0]]));
    }""")
