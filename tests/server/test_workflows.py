"""The example workflows: the same graph for canvas and scripts, and each runs on the demo model."""

import json

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import save_file

from release import blueprints, workflow_runs, workflows

FOLLOWED = {  # by control_after_generate or upload
    ("KSampler", "seed"),
    ("LoadImage", "image"),
    ("CATSamplePhoto", "image"),
    ("PrimitiveInt", "value"),
}
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def canvas(name: str) -> dict:
    return json.loads((ROOT / f"workflows/{name}.json").read_text())


def api(name: str) -> dict:
    return json.loads((ROOT / f"workflows/api/{name}.json").read_text())


# The files ------------------------------------------------------------------------------------


def test_every_workflow_is_offered_with_a_picture_and_a_twin(server):
    offered = server.get("/workflow_templates")["cat-diffusion"]
    assert sorted(offered) == NAMES == sorted(workflows.WORKFLOWS)
    for name in NAMES:
        assert server.get(f"/api/workflow_templates/cat-diffusion/{name}.json") == canvas(name)
        picture = ROOT / f"workflows/{name}.jpg"
        assert picture.exists() == (name not in workflow_runs.NOT_SHOWN)
        assert not picture.exists() or Image.open(picture).height == 320
        assert (ROOT / f"workflows/api/{name}.json").is_file()


def test_the_files_are_what_the_tool_writes(server):
    """Node inputs come from the host: a changed schema shows; older hosts know fewer options."""
    info = server.get("/object_info")
    for name in NAMES:
        graph = workflows.Graph(info)
        workflows.WORKFLOWS[name](graph)
        assert graph.api() == api(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_ui_workflow_is_the_same_graph_as_the_api_one(server, name):
    """Every node, link and value of the drag-in file against its scripting twin."""
    ui = canvas(name)
    twin = api(name)
    links = {link[0]: link for link in ui["links"]}
    nodes = {str(node["id"]): node for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    assert nodes.keys() == twin.keys()
    info = server.get("/object_info")
    for number, node in nodes.items():
        assert node["type"] == twin[number]["class_type"]
        check_inputs(node, twin[number]["inputs"], links)
        check_slots(node, info[node["type"]])


def check_inputs(node, expected, links):
    """Links and values of a node on the canvas are those of its twin."""
    linked = {}
    for slot in node["inputs"]:
        if slot["link"] is not None:
            _, source, output, *_ = links[slot["link"]]
            linked[slot["name"]] = [str(source), output]
    assert linked == {name: value for name, value in expected.items() if isinstance(value, list)}
    values = list(node["widgets_values"])
    for slot in node["inputs"]:
        if "widget" not in slot:
            continue
        value = values.pop(0)
        if (node["type"], slot["name"]) in FOLLOWED:
            values.pop(0)
        if slot["name"] not in linked:
            assert value == expected[slot["name"]], (node["type"], slot["name"])
    assert values == []


def check_slots(node, schema):
    """Names of inputs and types of outputs are in the order that the host gives them."""
    names = [*schema["input"]["required"], *schema["input"].get("optional", {})]
    assert [slot["name"] for slot in node["inputs"]] == names
    types = [slot["type"] for slot in node["outputs"]]
    assert types == schema["output"][: len(types)]  # newer hosts give Save Image an output


def test_models_that_can_be_downloaded_are_named(server):
    """The host's dialog of missing models reads them off the loaders."""
    kinds = server.get("/api/models")
    for name in NAMES:
        for node in canvas(name)["nodes"]:
            for model in node["properties"].get("models", []):
                assert model["name"] in node["widgets_values"]
                assert model["url"].startswith("https://huggingface.co/")
                assert model["url"].endswith((".safetensors", ".ckpt"))
                assert model["directory"] in kinds


def test_blueprints_are_listed_and_are_what_the_tool_writes(server):
    """One node, whose inputs are those of its subgraph, and every link ends where it says."""
    info = server.get("/object_info")
    offered = server.get("/global_subgraphs")
    ids = {one["name"]: id for id, one in offered.items() if one["source"] == "custom_node"}
    assert set(ids) == set(blueprints.ALL)
    for name, id in ids.items():
        served = json.loads(server.get(f"/global_subgraphs/{id}")["data"])
        written = blueprints.blueprint(name, info)
        (outer,) = served["nodes"]
        (subgraph,) = served["definitions"]["subgraphs"]
        inputs = [slot["name"] for slot in outer["inputs"]]
        assert inputs == [port["name"] for port in subgraph["inputs"]]
        assert inputs == [slot["name"] for slot in written["nodes"][0]["inputs"]]
        ends = {node["id"]: node for node in subgraph["nodes"]}
        for link in subgraph["links"]:
            if link["target_id"] in ends:
                slot = ends[link["target_id"]]["inputs"][link["target_slot"]]
                assert slot["link"] == link["id"]
            if link["origin_id"] in ends:
                slot = ends[link["origin_id"]]["outputs"][link["origin_slot"]]
                assert link["id"] in slot["links"]


# Running them ---------------------------------------------------------------------------------


@pytest.fixture
def made(run, picture):
    """Run a workflow that must succeed; the picture that it saves."""

    def made(prompt):
        result, _ = run(prompt)
        for number, node in prompt.items():
            if node["class_type"] == "SaveImage":
                return picture(result, number)
        raise AssertionError("the workflow saves no picture")

    return made


def scenes_of(prompt):
    """(picture, hole) of a workflow's first scene; the hole is that of all its scenes."""
    pictures = []
    holes = []
    for node in prompt.values():
        if node["class_type"] == "CATDemoScene":
            path = ROOT / f"web/scenes/{node['inputs']['scene']}.png"
            rgba = np.asarray(Image.open(path)).astype(int)
            pictures.append(rgba[..., :3])
            holes.append(rgba[..., 3] < 255)
    return pictures[0], np.any(holes, axis=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cat_train"])
def test_every_workflow_runs_on_the_demo_model(made, name):
    prompt = workflow_runs.on_demo(workflow_runs.without_extras(api(name)))
    pixels = made(prompt)
    original, hole = scenes_of(prompt)
    if name == "cat_compare":  # plain and CAT side by side, 8 pixels of white between them
        plain = pixels[:, :128]
        pixels = pixels[:, 136:]
        # Both get the black hole that the demo U-Net knows, so that only RefAdapter differs.
        assert (plain[hole] != pixels[hole]).any()
        assert (plain[~hole] == pixels[~hole]).all()
    assert pixels.shape == original.shape
    assert (pixels[~hole] == original[~hole]).all()
    assert np.abs(pixels[hole] - original[hole]).mean() > 10


def test_the_training_workflow_runs_on_the_demo_model(run, base):
    prompt = workflow_runs.on_demo(workflow_runs.without_extras(api("cat_train")))
    workflow_runs.examples(base / "input/my_examples", 4)
    for node in prompt.values():
        if node["class_type"] == "CATTrainSemInpainter":
            node["inputs"].update(steps=3, batch_size=2)
    run(prompt)


def test_lora_and_controlnet_change_the_picture(made, base):
    """The workflow as it is, with a small LoRA for the demo U-Net and a small ControlNet."""
    layer = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    matrices = {
        f"{layer}.lora_up.weight": torch.randn(128, 4),
        f"{layer}.lora_down.weight": torch.randn(4, 128),
    }
    save_file(matrices, base / "models/loras/demo.safetensors")
    whole = workflow_runs.on_demo(api("cat_lora_controlnet"))
    for node in whole.values():
        if node["class_type"] == "LoraLoader":
            node["inputs"]["lora_name"] = "demo.safetensors"
        elif node["class_type"] == "ControlNetLoader":
            node.update(class_type="HelperControlNet", inputs={"demo": True})
    plain = workflow_runs.on_demo(workflow_runs.without_extras(api("cat_lora_controlnet")))
    assert np.abs(made(whole) - made(plain)).max() > 5
