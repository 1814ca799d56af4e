"""Draw the pictures of the help pages: each node of the pack on ComfyUI's canvas, after a real run.

    python tools/run.py release.node_pictures [--node CATSemanticInpaint ...] [--out FOLDER]

Writes web/docs/NODE_ID.png in English and web/docs/NODE_ID/zh.png in Chinese. ComfyUI's Python must
have playwright; the browser is the system's Chromium, or the one that `playwright install chromium`
brings. It also needs a font with Chinese characters.
"""

import argparse
import asyncio
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Collection
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from cat_diffusion.cat_core.errors import few
from comfyui import ROOT
from comfyui.local_server import LocalServer, make_base
from demo_model import scenes

DOCS = ROOT / "web/docs"
LANGUAGES = {"en": "{node}.png", "zh": "{node}/zh.png"}
WIDTH = 600  # pixels, of a finished picture at most
COLOURS = 96  # of its palette
SCALE = 2  # device pixels a pixel of the page
NODE_WIDTH = 300  # pixels of the page
APART = 1500  # pixels between the nodes, so that none lies over another
MARGIN = 12  # pixels of canvas around a node: the dots of its slots lie on its border
TIMEOUT = 180_000  # milliseconds for the page to open
EXAMPLES = 24  # training scenes

# The page has loaded when its own, empty workflow is open and it knows the pack's nodes.
IS_READY = """() => window.app?.extensionManager?.workflow?.activeWorkflow
    && LiteGraph.registered_node_types.CATLoadCheckpoint"""
LOAD = """async ([workflow, width, apart]) => {
    await app.loadApiJson(workflow, "pictures")
    app.graph._nodes.forEach((node, i) => {
        node.setSize([width, node.computeSize()[1]])
        node.pos = [i % 4 * apart, Math.floor(i / 4) * apart]
    })
}"""
RUN = """() => new Promise(done => {
    app.api.addEventListener("execution_success", () => done(null))
    app.api.addEventListener("execution_error", event => done(event.detail))
    app.queuePrompt(0, 1)
})"""
SHOW = """async ([kind, margin]) => {
    const node = app.graph._nodes.find(node => node.type === kind)
    node.setSize([node.size[0], node.computeSize()[1]])
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [400 - node.pos[0], 100 - node.pos[1]]
    app.canvas.setDirty(true, true)
    await new Promise(done => setTimeout(done, 1000))
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    const box = element.getBoundingClientRect()
    return {x: box.x - margin, y: box.y - margin, width: box.width + 2 * margin,
            height: box.height + 2 * margin}
}"""


def workflow(run: int, nodes: Collection[str]) -> dict:
    """The demo workflow with all the nodes to be drawn, in API format.

    The id of a node of the pack is its class.

    Args:
        run: another number each time, so that the host computes CATSemanticInpaint again: from its
            cache it shows no preview, since that is no output node.
    """
    workflow = _demo()
    workflow["CATSemanticInpaint"]["inputs"]["text"] = "red star" + run * " "
    workflow["whole"] = {"class_type": "LoadImage", "inputs": {"image": "whole.png"}}
    beside = beside_demo()
    for kind in nodes:
        _add(workflow, kind, beside)
    return workflow


def _add(workflow: dict, kind: str, beside: dict[str, dict]) -> None:
    """A node beside the demo workflow, after those that its inputs come from."""
    if kind in workflow or kind not in beside:
        return
    for value in beside[kind].values():
        if isinstance(value, list):
            _add(workflow, value[0], beside)
    workflow[kind] = {"class_type": kind, "inputs": beside[kind]}


def _demo() -> dict:
    """workflows/api/cat_demo.json, its nodes of the pack under their classes."""
    demo = json.loads((ROOT / "workflows/api/cat_demo.json").read_text())
    ids = {}
    for number, node in demo.items():
        kind = node["class_type"]
        ids[number] = kind if kind.startswith("CAT") else number
    renamed = {}
    for number, node in demo.items():
        inputs = {}
        for name, value in node["inputs"].items():
            inputs[name] = [ids[value[0]], value[1]] if isinstance(value, list) else value
        renamed[ids[number]] = {"class_type": node["class_type"], "inputs": inputs}
    return renamed


def beside_demo() -> dict[str, dict]:
    """The inputs of the nodes that the demo workflow does not have, by class."""
    model, clip, vae, clip_vision, cat_model = (["CATLoadCheckpoint", i] for i in range(5))
    training = {
        "clip_vision": clip_vision,
        "clip": clip,
        "folder": "shapes",
        "learning_rate": 1e-3,
        "precision": "fp32",
        "seed": 0,
        "licence": "unknown",
    }
    return {
        "CATSamplePhoto": {"image": "cat_sample_photo.png [temp]"},
        "CATLoadWeights": {"weights": "cat_demo_model.safetensors"},
        "CATEncodeVisualPrompt": {"clip_vision": clip_vision, "image": ["whole", 0]},
        "CATVisualPromptToClipVision": {
            "visual_prompt": ["CATSemanticInpaint", 0],
            "clip_vision": clip_vision,
        },
        "CATCropAroundMask": {
            "image": ["whole", 0],
            "mask": ["whole", 1],
            "size": 128,
            "context": 1.5,
        },
        "CATStitch": {
            "crop": ["CATCropAroundMask", 2],
            "image": ["CATCropAroundMask", 0],
            "soft_edge": 8,
        },
        "CATScheduler": {"model": model, "steps": 50, "denoise": 1.0},
        "CATCompareFeatures": {
            "cat_model": cat_model,
            "clip_vision": clip_vision,
            "clip": clip,
            "image": ["whole", 0],
            "mask": ["whole", 1],
            "text": "red star",
        },
        "CATVisualPromptPreview": {
            "visual_prompt": ["CATSemanticInpaint", 0],
            "clip": clip,
            "clip_vision": clip_vision,
        },
        "CATTrainSemInpainter": {
            **training,
            "steps": 100,
            "batch_size": 8,
            "masked_loss": False,
            "filename_prefix": "sem_inpainter",
        },
        "CATTrainRefAdapter": {
            **training,
            "model": model,
            "vae": vae,
            "size": 128,
            "steps": 60,
            "batch_size": 4,
            "micro_batch_size": 4,
            "checkpointing": False,
            "filename_prefix": "ref_adapter",
        },
    }


def prepare(base: Path) -> None:
    """A user folder for ComfyUI with what the workflow reads.

    That is a picture with an object, and training examples.
    """
    make_base(base)
    shapes = base / "input/shapes"
    shapes.mkdir()
    for seed in range(EXAMPLES):
        scene = scenes.scene(seed)
        name = f"{scene.label} {seed}".replace(" ", "_")
        Image.fromarray(scene.image).save(shapes / f"{name}_image.png")
        Image.fromarray(scenes.holes(scene, "exact")).save(shapes / f"{name}_mask.png")
    drawn = map(scenes.scene, scenes.TEST)
    scene = next(scene for scene in drawn if scene.label == "red star")
    whole = Image.fromarray(scene.image)
    whole.putalpha(ImageOps.invert(Image.fromarray(scenes.holes(scene, "box"))))
    whole.save(base / "input/whole.png")


async def draw(url: str, nodes: Collection[str], folder: Path) -> None:
    """Load the workflow in a browser, run it, and take a picture of each node in both languages."""
    from playwright.async_api import async_playwright

    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    chromium = next(filter(None, programs), None)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        # A run from the host's cache leaves results on the nodes, and none of the progress that
        # otherwise stays beside them: so everything runs once before the first picture.
        page = await open_canvas(browser, url, "en", workflow(0, nodes))
        await page.close()
        for run, (language, name) in enumerate(LANGUAGES.items(), 1):
            page = await open_canvas(browser, url, language, workflow(run, nodes))
            for node in nodes:
                target = folder / name.format(node=node)
                target.parent.mkdir(parents=True, exist_ok=True)
                save(await photograph(page, node), target)
                if language != "en":
                    copy_for_github(target)
                print(f"{target}: {target.stat().st_size / 1024:.0f} kB", flush=True)
            await page.close()
        await browser.close()


async def open_canvas(browser, url: str, language: str, workflow: dict):
    """A page of ComfyUI with the workflow on its canvas, run to its end."""
    page = await browser.new_page(
        viewport={"width": 1600, "height": 1200}, device_scale_factor=SCALE
    )
    page.set_default_timeout(TIMEOUT)
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.Locale": language,
        "Comfy.VueNodes.Enabled": True,
        "Comfy.LinkRenderMode": -1,  # links hidden
    }
    await page.request.post(f"{url}/api/settings", data=settings)
    await page.goto(url)
    await page.wait_for_function(IS_READY)
    await page.evaluate(LOAD, [workflow, NODE_WIDTH, APART])
    error = await page.evaluate(RUN)
    if error:
        sys.exit(f"{error['node_type']} failed: {error['exception_message']}")
    return page


async def photograph(page, node: str) -> bytes:
    """PNG of one node with a margin of canvas."""
    box = await page.evaluate(SHOW, [node, MARGIN])
    return await page.screenshot(clip=box)


def save(png: bytes, target: Path) -> None:
    """Write a picture small."""
    picture = Image.open(BytesIO(png)).convert("RGB")
    if picture.width > WIDTH:
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def copy_for_github(picture: Path) -> None:
    """GitHub takes addresses in NODE/zh.md as relative to NODE/, ComfyUI as relative to docs/."""
    copy = picture.parent / picture.parent.name / picture.name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(picture, copy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--node", nargs="+", metavar="NODE_ID", help="only these nodes")
    parser.add_argument(
        "--out", type=Path, default=DOCS, metavar="FOLDER", help="write them here (web/docs)"
    )
    arguments = parser.parse_args()
    if not importlib.util.find_spec("playwright"):
        parser.error(
            "playwright is missing in ComfyUI's Python. Install it with: "
            f'"{sys.executable}" -m pip install playwright'
        )
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        with LocalServer(Path(folder), "--cpu") as server:
            nodes = arguments.node or nodes_of_pack(server)
            missing = [node for node in nodes if node not in workflow(0, nodes)]
            if missing:
                parser.error(
                    f"the workflow has no {few(missing)}: expected ids of the pack's nodes, each "
                    "in the demo workflow or in beside_demo() of tools/release/node_pictures.py."
                )
            asyncio.run(draw(server.url, nodes, arguments.out))
    return 0


def nodes_of_pack(server: LocalServer) -> list[str]:
    """Ids of the nodes that this pack brings."""
    nodes = []
    for name, node in server.get("/object_info").items():
        if node["python_module"].endswith("cat-diffusion"):
            nodes.append(name)
    return nodes
