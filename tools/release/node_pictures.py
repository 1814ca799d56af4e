"""Draw the pictures of the help pages again: every node of the pack on ComfyUI's canvas, after a real run of the demo model.

    python tools/node_pictures.py [--node CATSemanticInpaint ...] [--comfyui PATH [--python PATH]]

Writes web/docs/NODE_ID.png in English and web/docs/NODE_ID/zh.png in Chinese. Runs in ComfyUI's Python, which must have
playwright; the browser is the system's Chromium, or the one that `playwright install chromium` brings. It also needs a
font with Chinese characters.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from comfyui import ROOT

DOCS = ROOT / "web/docs"
LANGUAGES = {"en": "{node}.png", "zh": "{node}/zh.png"}
WIDTH = 600  # pixels, of a finished picture at most
COLOURS = 128  # of its palette
SCALE = 2  # device pixels a pixel of the page
NODE_WIDTH = 300  # pixels of the page
APART = 1500  # pixels between the nodes, so that none lies over another
MARGIN = 12  # pixels of canvas around a node: the dots of its slots lie on its border
TIMEOUT = 180_000  # milliseconds for the page to open
EXAMPLES = 24  # training scenes


def workflow(run: int) -> dict:
    """All nodes of the pack around the demo workflow, in API format; a node's id is its class where it is drawn.

    `run` is another number each time, so that the host computes CATSemanticInpaint again: from its cache it shows no preview,
    since that is no output node.
    """
    demo = json.loads((ROOT / "workflows/api/cat_demo.json").read_text())
    ids = {
        number: node["class_type"] if node["class_type"].startswith("CAT") else number
        for number, node in demo.items()
    }

    def renamed(value):
        return [ids[value[0]], value[1]] if isinstance(value, list) else value

    nodes = {
        ids[number]: {
            "class_type": node["class_type"],
            "inputs": {name: renamed(value) for name, value in node["inputs"].items()},
        }
        for number, node in demo.items()
    }
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
    extra = {
        "whole": ("LoadImage", {"image": "whole.png"}),
        "CATLoadWeights": ("CATLoadWeights", {"weights": "cat_demo_model.safetensors"}),
        "CATEncodeVisualPrompt": (
            "CATEncodeVisualPrompt",
            {"clip_vision": clip_vision, "image": ["whole", 0]},
        ),
        "CATScheduler": ("CATScheduler", {"model": model, "steps": 50, "denoise": 1.0}),
        "CATCompareFeatures": (
            "CATCompareFeatures",
            {
                "cat_model": cat_model,
                "clip_vision": clip_vision,
                "clip": clip,
                "image": ["whole", 0],
                "mask": ["whole", 1],
                "text": "red star",
            },
        ),
        "CATVisualPromptPreview": (
            "CATVisualPromptPreview",
            {"visual_prompt": ["CATSemanticInpaint", 0], "clip": clip, "clip_vision": clip_vision},
        ),
        "CATTrainSemInpainter": (
            "CATTrainSemInpainter",
            {
                **training,
                "steps": 100,
                "batch_size": 8,
                "masked_loss": False,
                "filename_prefix": "sem_inpainter",
            },
        ),
        "CATTrainRefAdapter": (
            "CATTrainRefAdapter",
            {
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
        ),
    }
    nodes["CATSemanticInpaint"]["inputs"]["text"] = "red star" + run * " "
    return nodes | {
        id: {"class_type": kind, "inputs": inputs} for id, (kind, inputs) in extra.items()
    }


def prepare(base: Path) -> None:
    """A user folder for ComfyUI with what the workflow reads: a picture with an object, and training examples."""
    from PIL import Image, ImageOps

    from comfyui.local_server import make_base
    from demo_model import scenes

    make_base(base)
    shapes = base / "input/shapes"
    shapes.mkdir()
    for seed in range(EXAMPLES):
        scene = scenes.scene(seed)
        name = f"{scene.label} {seed}".replace(" ", "_")
        Image.fromarray(scene.image).save(shapes / f"{name}_image.png")
        Image.fromarray(scenes.holes(scene, "exact")).save(shapes / f"{name}_mask.png")
    scene = next(
        scene for scene in map(scenes.scene, scenes.SPLITS["test"]) if scene.label == "red star"
    )
    whole = Image.fromarray(scene.image)
    whole.putalpha(ImageOps.invert(Image.fromarray(scenes.holes(scene, "box"))))
    whole.save(base / "input/whole.png")


async def draw(url: str, nodes: list[str]) -> None:
    """Load the workflow in a browser, run it, and take a picture of each node, in both languages."""
    from playwright.async_api import async_playwright

    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        # A run from the host's cache leaves results on the nodes, and none of the progress that stays beside them.
        await (await open_canvas(browser, url, "en", 0)).close()
        for run, (language, name) in enumerate(LANGUAGES.items(), 1):
            page = await open_canvas(browser, url, language, run)
            for node in nodes:
                target = DOCS / name.format(node=node)
                target.parent.mkdir(exist_ok=True)
                size = save(await photograph(page, node), target)
                print(f"{target.relative_to(ROOT)}: {size / 1024:.0f} kB", flush=True)
            await page.close()
        await browser.close()


async def open_canvas(browser, url: str, language: str, run: int):
    """A page of ComfyUI with the workflow on its canvas, run to its end."""
    page = await browser.new_page(
        viewport={"width": 1600, "height": 1200}, device_scale_factor=SCALE
    )
    page.set_default_timeout(TIMEOUT)
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.Locale": language,
        "Comfy.VueNodes.Enabled": True,
        "Comfy.LinkRenderMode": -1,
    }  # links hidden
    await page.request.post(f"{url}/api/settings", data=settings)
    await page.goto(url)
    await (
        page.wait_for_function("""() => window.app?.extensionManager?.workflow?.activeWorkflow
                                          && LiteGraph.registered_node_types.CATLoadCheckpoint""")
    )  # its own workflow comes first
    await page.evaluate(
        """async ([workflow, width, apart]) => {
        await app.loadApiJson(workflow, "pictures")
        app.graph._nodes.forEach((node, i) => {
            node.setSize([width, node.computeSize()[1]])
            node.pos = [i % 4 * apart, Math.floor(i / 4) * apart]
        })
    }""",
        [workflow(run), NODE_WIDTH, APART],
    )
    ended = await page.evaluate("""() => new Promise(done => {
        app.api.addEventListener("execution_success", () => done(null))
        app.api.addEventListener("execution_error", event => done(event.detail))
        app.queuePrompt(0, 1)
    })""")
    if ended:
        sys.exit(f"{ended['node_type']} failed: {ended['exception_message']}")
    return page


async def photograph(page, node: str) -> bytes:
    """PNG of one node with a margin of canvas."""
    box = await page.evaluate(
        """async ([kind, margin]) => {
        const node = app.graph._nodes.find(node => node.type === kind)
        node.setSize([node.size[0], node.computeSize()[1]])
        app.canvas.ds.scale = 1
        app.canvas.ds.offset = [400 - node.pos[0], 100 - node.pos[1]]
        app.canvas.setDirty(true, true)
        await new Promise(done => setTimeout(done, 1000))
        const element = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect()
        return {x: element.x - margin, y: element.y - margin, width: element.width + 2 * margin,
                height: element.height + 2 * margin}
    }""",
        [node, MARGIN],
    )
    return await page.screenshot(clip=box)


def save(png: bytes, target: Path) -> int:
    """Write a picture small; returns its bytes."""
    from PIL import Image

    picture = Image.open(BytesIO(png)).convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize(
            (WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS
        )
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    return target.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--node", nargs="+", metavar="NODE_ID", help="only these nodes")
    arguments = parser.parse_args()
    try:
        import playwright.async_api
    except ImportError:
        parser.error(
            f'playwright is missing in ComfyUI\'s Python. Install it with: "{sys.executable}" -m pip install playwright'
        )
    from comfyui.local_server import LocalServer

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        with LocalServer(Path(folder), "--cpu") as server:
            found = [
                name
                for name, node in server.get("/object_info").items()
                if node["python_module"].endswith("cat-diffusion")
            ]
            asyncio.run(draw(server.url, arguments.node or found))
    return 0
