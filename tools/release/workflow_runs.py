"""The example workflows on the demo model, which has no use for the files that their users bring."""

import json
from pathlib import Path

from comfyui import ROOT

FOLDER = ROOT / "workflows"
DEMO = "cat_demo_model.safetensors"


def on_demo(prompt: dict, label: str = "red star", scene: str = "square hole") -> dict:
    """An API workflow with the demo model in place of files that users have to bring, and a drawn scene for the photo."""
    prompt = json.loads(json.dumps(prompt)) | {
        "demo": {"class_type": "CATLoadCheckpoint", "inputs": {"checkpoint": DEMO}}
    }
    outputs = {
        "CheckpointLoaderSimple": {0: 0, 1: 1, 2: 2},
        "CLIPVisionLoader": {0: 3},
        "CATLoadWeights": {0: 4},
    }
    gone = {id: node for id, node in prompt.items() if node["class_type"] in outputs}
    crop = {"Left edge of the crop": 0, "Upper edge of the crop": 28, "Side of the crop": 100}
    for id, node in list(prompt.items()):
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in gone:
                inputs[name] = ["demo", outputs[gone[value[0]]["class_type"]][value[1]]]
        if node["class_type"] == "CATLoadCheckpoint":
            inputs["checkpoint"] = DEMO
        elif node["class_type"] == "LoadImage":
            node["class_type"], node["inputs"] = "CATDemoScene", {"scene": scene}
        elif node["class_type"] == "PrimitiveString" and inputs["value"] == "spoon":
            inputs["value"] = label
        elif node["class_type"] == "PrimitiveInt":
            inputs["value"] = crop[node["_meta"]["title"]]
        elif node["class_type"] == "ImageScaleToTotalPixels":
            inputs["megapixels"] = 128 * 128 / 1024**2
        elif node["class_type"] == "GrowMask":
            inputs["expand"] = -1
        elif node["class_type"] == "ImageBlur":
            inputs |= {"blur_radius": 1, "sigma": 1.0}
        elif node["class_type"] == "KSampler":
            inputs |= {"steps": 20, "cfg": 3.0}
    return {id: node for id, node in prompt.items() if id not in gone}


# What the thumbnails show, so that they are not all the same picture.
SHOWN = {
    "cat_weights": ("yellow star", "star-shaped hole"),
    "cat_inpaint": ("purple ring",),
    "cat_reference": ("green circle",),
    "cat_lora_controlnet": ("blue cross",),
    "cat_crop": ("yellow circle",),
    "cat_compare": ("pink heart",),
}


def examples(folder: Path, count: int = 24) -> None:
    """A folder of scenes as the training nodes want it: NAME.png, NAME_mask.png, NAME.txt."""
    import numpy as np
    from PIL import Image

    from demo_model import scenes

    folder.mkdir(parents=True)
    for seed in scenes.TRAIN[:count]:
        scene = scenes.scene(seed)
        Image.fromarray(scene.image).save(folder / f"{seed}.png")
        Image.fromarray(np.where(scene.mask > 0, 255, 0).astype(np.uint8)).save(
            folder / f"{seed}_mask.png"
        )
        (folder / f"{seed}.txt").write_text(scene.label)


def thumbnail(server, name: str) -> None:
    """Run a workflow on the demo model and keep its picture, beside the scene with its hole."""
    from PIL import Image

    api = json.loads((FOLDER / f"api/{name}.json").read_text())
    prompt = on_demo(without_extras(api), *SHOWN.get(name, ()))
    run = server.run(prompt)
    if run.error:
        raise RuntimeError(f"{name}: {run.error['exception_message']}")
    kind = "PreviewImage" if name == "cat_train" else "SaveImage"
    node = next(id for id, node in prompt.items() if node["class_type"] == kind)
    with Image.open(server.image_path(run.outputs[node]["images"][0])) as file:
        made = file.convert("RGB")
    pictures = [made]
    if kind == "SaveImage":
        holes = [
            node["inputs"]["scene"]
            for node in prompt.values()
            if node["class_type"] == "CATDemoScene"
        ]
        hidden = Image.new("RGB", (128, 128), "white")
        with Image.open(ROOT / f"web/scenes/{holes[0]}.png") as scene:
            hidden.paste(scene.convert("RGB"))
        for hole in holes:
            with Image.open(ROOT / f"web/scenes/{hole}.png") as scene:
                hidden.paste("white", mask=scene.getchannel("A").point(lambda value: 255 - value))
        pictures = [hidden, made]
    height = 320
    pictures = [
        p.resize((round(p.width * height / p.height), height), Image.Resampling.LANCZOS)
        for p in pictures
    ]
    strip = Image.new(
        "RGB", (sum(p.width for p in pictures) + 8 * (len(pictures) - 1), height), "white"
    )
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + 8
    strip.save(FOLDER / f"{name}.jpg", quality=88)


def without_extras(prompt: dict) -> dict:
    """Without LoRA and ControlNet, of which there are none for the demo model."""
    passed = {"LoraLoader": ("model", "clip"), "ControlNetApplyAdvanced": ("positive", "negative")}
    kinds = {*passed, "ControlNetLoader", "Canny"}
    reference = {
        link[0]
        for node in prompt.values()
        if node["class_type"] == "Canny"
        for link in [node["inputs"]["image"]]
    }

    def origin(value):
        while isinstance(value, list) and prompt[value[0]]["class_type"] in passed:
            node = prompt[value[0]]
            value = node["inputs"][passed[node["class_type"]][value[1]]]
        return value

    return {
        id: node | {"inputs": {name: origin(value) for name, value in node["inputs"].items()}}
        for id, node in prompt.items()
        if node["class_type"] not in kinds and id not in reference
    }
