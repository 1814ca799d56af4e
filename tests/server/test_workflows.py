"""The example workflows: the same graph for canvas and scripts, and every one of them runs, on the demo model."""

import json

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from release import workflow_runs, workflows

FOLLOWED = {
    ("KSampler", "seed"),
    ("LoadImage", "image"),
    ("PrimitiveInt", "value"),
}  # by control_after_generate or upload
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def test_every_workflow_is_offered_with_a_picture_and_a_twin(server):
    assert (
        sorted(server.get("/workflow_templates")["cat-diffusion"])
        == NAMES
        == sorted(workflows.WORKFLOWS)
    )
    for name in NAMES:
        assert server.get(f"/api/workflow_templates/cat-diffusion/{name}.json") == canvas(name)
        assert Image.open(ROOT / f"workflows/{name}.jpg").height == 320
        assert (ROOT / f"workflows/api/{name}.json").is_file()


def test_the_files_are_what_the_tool_writes(server):
    """Node inputs come from the host, so a changed schema shows here; older hosts know fewer options."""
    info = server.get("/object_info")
    for name in NAMES:
        graph = workflows.Graph(info)
        workflows.WORKFLOWS[name](graph)
        assert graph.api() == api(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_ui_workflow_is_the_same_graph_as_the_api_one(server, name):
    """Every node, link and value of the drag-in file against its scripting twin."""
    ui, twin = canvas(name), api(name)
    links = {link[0]: link for link in ui["links"]}
    nodes = {str(node["id"]): node for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    assert nodes.keys() == twin.keys()
    info = server.get("/object_info")
    for number, node in nodes.items():
        assert node["type"] == twin[number]["class_type"]
        inputs = twin[number]["inputs"]
        linked = {
            slot["name"]: [str(links[slot["link"]][1]), links[slot["link"]][2]]
            for slot in node["inputs"]
            if slot["link"] is not None
        }
        assert linked == {name: value for name, value in inputs.items() if isinstance(value, list)}
        names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        values = list(node["widgets_values"])
        for name in names:
            value = values.pop(0)
            if (node["type"], name) in FOLLOWED:
                values.pop(0)
            if name not in linked:
                assert value == inputs[name], (node["type"], name)
        assert values == []
        schema = info[node["type"]]
        assert [slot["name"] for slot in node["inputs"]] == [
            *schema["input"]["required"],
            *schema["input"].get("optional", {}),
        ]
        types = [slot["type"] for slot in node["outputs"]]
        assert types == schema["output"][: len(types)]  # newer hosts give Save Image an output


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_runs_on_the_demo_model(server, base, name):
    prompt = workflow_runs.on_demo(workflow_runs.without_extras(api(name)))
    for node in prompt.values():
        if node["class_type"] == "CATTrainSemInpainter":
            node["inputs"] |= {"steps": 3, "batch_size": 2}
            if not (base / "input/my_examples").exists():
                workflow_runs.examples(base / "input/my_examples", 4)
    result = server.run(prompt)
    assert result.error is None, result.error["exception_message"]
    if name == "cat_train":
        return
    made = saved(server, prompt, result)
    scenes = [
        scene(node["inputs"]["scene"])
        for node in prompt.values()
        if node["class_type"] == "CATDemoScene"
    ]
    picture, hole = scenes[0][0], np.max([mask for _, mask in scenes], axis=0) > 0
    if name == "cat_compare":  # plain and CAT side by side, 8 pixels of white between them
        halves = made[:, :128], made[:, 136:]
        assert np.abs(halves[0][hole] - halves[1][hole]).mean() > 5
        made = halves[1]
    assert made.shape == picture.shape
    assert (made[~hole] == picture[~hole]).all()
    assert np.abs(made[hole] - picture[hole]).mean() > 10


def test_lora_and_controlnet_change_the_picture(server, base):
    """The workflow as it is, with a small LoRA for the demo U-Net and a small ControlNet."""
    import torch
    from safetensors.torch import save_file

    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    save_file(
        {
            f"{name}.lora_up.weight": torch.randn(128, 4),
            f"{name}.lora_down.weight": torch.randn(4, 128),
        },
        base / "models/loras/demo.safetensors",
    )
    whole = workflow_runs.on_demo(api("cat_lora_controlnet"))
    for node in whole.values():
        if node["class_type"] == "LoraLoader":
            node["inputs"]["lora_name"] = "demo.safetensors"
        elif node["class_type"] == "ControlNetLoader":
            node |= {"class_type": "HelperControlNet", "inputs": {"demo": True}}
    plain = workflow_runs.on_demo(workflow_runs.without_extras(api("cat_lora_controlnet")))
    pictures = []
    for prompt in (whole, plain):
        result = server.run(prompt)
        assert result.error is None, result.error["exception_message"]
        pictures.append(saved(server, prompt, result))
    assert np.abs(pictures[0] - pictures[1]).max() > 5


def test_models_that_can_be_downloaded_are_named(server):
    """The host's dialog of missing models reads them off the loaders."""
    for name in NAMES:
        for node in canvas(name)["nodes"]:
            for model in node["properties"].get("models", []):
                assert model["name"] in node["widgets_values"]
                assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(
                    (".safetensors", ".ckpt")
                )
                assert model["directory"] in server.get("/api/models")


def canvas(name: str) -> dict:
    return json.loads((ROOT / f"workflows/{name}.json").read_text())


def api(name: str) -> dict:
    return json.loads((ROOT / f"workflows/api/{name}.json").read_text())


def scene(name: str):
    """(picture, hole), both integers; the hole is 0 where the picture stays."""
    rgba = np.asarray(Image.open(ROOT / f"web/scenes/{name}.png")).astype(int)
    return rgba[..., :3], 255 - rgba[..., 3]


def saved(server, prompt, result) -> np.ndarray:
    node = next(id for id, node in prompt.items() if node["class_type"] == "SaveImage")
    return np.asarray(
        Image.open(server.image_path(result.outputs[node]["images"][0])).convert("RGB")
    ).astype(int)
