"""The example workflows on the demo model, without the files that their users bring."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from comfyui import ROOT
from demo_model import scenes

FOLDER = ROOT / "workflows"
DEMO = "cat_demo_model.safetensors"
# What the thumbnails show, label and hole, so that they are not all the same picture.
SHOWN = {
    "cat_weights": ("yellow star", "star-shaped hole"),
    "cat_inpaint": ("purple ring",),
    "cat_reference": ("green circle",),
    "cat_lora_controlnet": ("blue cross",),
    "cat_crop": ("yellow circle",),
    "cat_custom_checkpoint": ("pink crescent",),
}
# No thumbnail: the demo model draws nearly the same with RefAdapter and without.
NOT_SHOWN = {"cat_compare"}
HEIGHT = 320  # pixels, of a thumbnail
GAP = 8  # pixels between its pictures

# Loaders that the demo model's replaces: for each of their outputs, the number of its own.
_LOADERS = {
    "CheckpointLoaderSimple": (0, 1, 2),
    "CLIPVisionLoader": (3,),
    "CATLoadWeights": (4,),
}
# Inputs, by class of node, that suit the demo model and pictures of 128x128.
_INPUTS = {
    "CATLoadCheckpoint": {"checkpoint": DEMO},
    "ImageScaleToTotalPixels": {"megapixels": 128 * 128 / 1024**2},
    "GrowMask": {"expand": -1},
    "ImageBlur": {"blur_radius": 1, "sigma": 1.0},
    "CATCropAroundMask": {"size": 128},
    "CATStitch": {"soft_edge": 0},
    "KSampler": {"steps": 20, "cfg": 3.0},
}
# Nodes for which there are no files: for each of their outputs, the input to pass on instead.
_PASSED_ON = {
    "LoraLoader": ("model", "clip"),
    "ControlNetApplyAdvanced": ("positive", "negative"),
}


def on_demo(prompt: dict, label: str = "red star", scene: str = "square hole") -> dict:
    """An API workflow with the demo model for the files that users have to bring.

    A drawn scene takes the photo's place, and `label` that of the object's name.
    """
    adapted = {}
    for id, node in prompt.items():
        if node["class_type"] not in _LOADERS:
            adapted[id] = _node_on_demo(node, prompt, label, scene)
    adapted["demo"] = {"class_type": "CATLoadCheckpoint", "inputs": {"checkpoint": DEMO}}
    return adapted


def _node_on_demo(node: dict, prompt: dict, label: str, scene: str) -> dict:
    kind = node["class_type"]
    if kind in ("LoadImage", "CATSamplePhoto"):
        return node | {"class_type": "CATDemoScene", "inputs": {"scene": scene}}
    if kind == "InpaintModelConditioning":
        node = _filled_black(node)
    inputs = {}
    for name, value in node["inputs"].items():
        inputs[name] = _linked_to_demo(value, prompt)
    inputs |= _INPUTS.get(kind, {})
    if kind == "PrimitiveString" and inputs["value"] == "spoon":
        inputs["value"] = label
    return node | {"inputs": inputs}


def _filled_black(node: dict) -> dict:
    """Stock conditioning by CAT's node: the demo U-Net has seen black holes only, no grey ones."""
    inputs = dict(node["inputs"])
    inputs["image"] = inputs.pop("pixels")
    inputs["fill"] = "black"
    return node | {"class_type": "CATInpaintConditioning", "inputs": inputs}


def _linked_to_demo(value, prompt: dict):
    """The value of an input; a link to a loader leads to the demo model's instead."""
    if not isinstance(value, list):
        return value
    origin, output = value
    kind = prompt[origin]["class_type"]
    if kind not in _LOADERS:
        return value
    return ["demo", _LOADERS[kind][output]]


def without_extras(prompt: dict) -> dict:
    """Without LoRA and ControlNet, of which there are none for the demo model."""
    dropped = set()
    for id, node in prompt.items():
        kind = node["class_type"]
        if kind in _PASSED_ON or kind == "ControlNetLoader":
            dropped.add(id)
        if kind == "Canny":
            dropped |= {id, node["inputs"]["image"][0]}
    kept = {}
    for id, node in prompt.items():
        if id in dropped:
            continue
        inputs = {}
        for name, value in node["inputs"].items():
            inputs[name] = _origin(value, prompt)
        kept[id] = node | {"inputs": inputs}
    return kept


def _origin(value, prompt: dict):
    """The value of an input; a link to a node that is passed over leads to what comes before it."""
    while isinstance(value, list) and prompt[value[0]]["class_type"] in _PASSED_ON:
        node = prompt[value[0]]
        name = _PASSED_ON[node["class_type"]][value[1]]
        value = node["inputs"][name]
    return value


def examples(folder: Path, count: int = 24) -> None:
    """A folder of scenes as the training nodes want it: NAME.png, NAME_mask.png, NAME.txt."""
    folder.mkdir(parents=True)
    for seed in scenes.TRAIN[:count]:
        scene = scenes.scene(seed)
        mask = np.where(scene.mask > 0, 255, 0).astype(np.uint8)
        Image.fromarray(scene.image).save(folder / f"{seed}.png")
        Image.fromarray(mask).save(folder / f"{seed}_mask.png")
        (folder / f"{seed}.txt").write_text(scene.label)


def thumbnail(server, name: str) -> None:
    """Run a workflow on the demo model and keep its picture, beside the scene with its hole.

    Args:
        server: a running LocalServer.

    Raises:
        RuntimeError: a node failed.
    """
    api = json.loads((FOLDER / f"api/{name}.json").read_text())
    prompt = on_demo(without_extras(api), *SHOWN.get(name, ()))
    run = server.run(prompt)
    if run.error:
        raise RuntimeError(f"{name}: {run.error['exception_message']}")
    kind = "PreviewImage" if name == "cat_train" else "SaveImage"
    node = next(id for id, node in prompt.items() if node["class_type"] == kind)
    with Image.open(server.image_path(run.outputs[node]["images"][0])) as file:
        pictures = [file.convert("RGB")]
    if kind == "SaveImage":
        pictures.insert(0, _scene_with_holes(prompt))
    _side_by_side(pictures).save(FOLDER / f"{name}.jpg", quality=88)


def _scene_with_holes(prompt: dict) -> Image.Image:
    """The scene that a workflow starts from, white in its holes."""
    names = []
    for node in prompt.values():
        if node["class_type"] == "CATDemoScene":
            names.append(node["inputs"]["scene"])
    with Image.open(ROOT / f"web/scenes/{names[0]}.png") as file:
        picture = file.convert("RGB")
    for name in names:
        with Image.open(ROOT / f"web/scenes/{name}.png") as file:
            picture.paste("white", mask=ImageOps.invert(file.getchannel("A")))
    return picture


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one height on white, with a gap between them."""
    scaled = []
    for picture in pictures:
        width = round(picture.width * HEIGHT / picture.height)
        scaled.append(picture.resize((width, HEIGHT), Image.Resampling.LANCZOS))
    width = sum(picture.width for picture in scaled) + GAP * (len(scaled) - 1)
    strip = Image.new("RGB", (width, HEIGHT), "white")
    left = 0
    for picture in scaled:
        strip.paste(picture, (left, 0))
        left += picture.width + GAP
    return strip
