"""Blueprints: one node each for the canvas, with a whole workflow inside, as ComfyUI lists them.

The host offers subgraphs/*.json of every pack (its app/subgraph_manager.py) and shows an error to
everybody if one is not valid.
"""

import json
import uuid
from dataclasses import dataclass

from comfyui import ROOT
from release.graph import Graph, Output, PlacedNode
from release.workflow_parts import (
    BASE_FILE,
    CAT_WEIGHTS,
    CLIP_VISION_FILE,
    LoaderOutputs,
    apply_adapter,
    cat_diffusion,
    semantic_inpaint,
)

BLUEPRINTS = ROOT / "subgraphs"
INSIDE_IN = -10  # ids of the two ends of a subgraph (the frontend's subgraph constants)
INSIDE_OUT = -20
CATEGORY = "CAT-Diffusion"


@dataclass(frozen=True)
class Port:
    """An input of the one node: its name there, and the inputs inside that it goes to."""

    name: str
    targets: list[tuple[PlacedNode, str]]


@dataclass(frozen=True)
class Inside:
    """What a blueprint holds."""

    description: str
    inputs: list[Port]
    output: tuple[str, Output]  # its name, and where inside it comes from


def cat_inpaint(graph: Graph) -> Inside:
    """A named object into a photo of any size."""
    column = graph.column(310)
    files = column.step("Model files")
    where = column.step("Square around the mask", "photo")
    what = graph.column(320).step("What goes there", "text")
    draw = graph.column(290).step("Draw", "draw")
    back = graph.column(310).step("Put it back", "result")
    base = files.add("CheckpointLoaderSimple", height=100, ckpt_name=BASE_FILE)
    vision = files.add("CLIPVisionLoader", height=60, clip_name=CLIP_VISION_FILE)
    cat = files.add("CATLoadWeights", height=60, weights=CAT_WEIGHTS)
    models = LoaderOutputs(base[0], base[1], base[2], vision[0], cat[0])
    square = where.add("CATCropAroundMask", height=150, size=512, context=2.0)
    predicted = semantic_inpaint(what, models, image=square[0], mask=square[1], text="")
    made = cat_diffusion(draw, models, predicted, image=square[0], mask=square[1], label="")
    whole = back.add("CATStitch", height=80, crop=square[2], image=made[0], soft_edge=8)
    sampler = _first(graph, "KSampler")
    return Inside(
        description="Paint a named object into a photo where the mask is: cuts out the square "
        "around it, draws with CAT-Diffusion, and puts it back. Needs SD 1.5 inpainting, "
        "CLIP ViT-L/14 vision and CAT weights.",
        inputs=[
            Port("image", [(square, "image")]),
            Port("mask", [(square, "mask")]),
            Port("text", [(_first(graph, "CLIPTextEncode"), "text"), (predicted, "text")]),
            Port("seed", [(sampler, "seed")]),
            Port("steps", [(sampler, "steps")]),
            Port("strength", [(_first(graph, "CATApplyRefAdapter"), "strength")]),
            Port("context", [(square, "context")]),
            Port("ckpt_name", [(base, "ckpt_name")]),
            Port("clip_name", [(vision, "clip_name")]),
            Port("weights", [(cat, "weights")]),
        ],
        output=("IMAGE", whole[0]),
    )


def cat_visual_prompt(graph: Graph) -> Inside:
    """A model that is shown what goes into the hole."""
    files = graph.column(310).step("Model files")
    what = graph.column(320).step("What goes there", "text")
    patch = graph.column(310).step("Show it to the model", "draw")
    vision = files.add("CLIPVisionLoader", height=60, clip_name=CLIP_VISION_FILE)
    cat = files.add("CATLoadWeights", height=60, weights=CAT_WEIGHTS)
    predicted = what.add(
        "CATSemanticInpaint", height=560, cat_model=cat[0], clip_vision=vision[0], text=""
    )
    nothing = (0, 0)  # the model comes from outside
    models = LoaderOutputs(nothing, nothing, nothing, vision[0], cat[0])
    adapted = apply_adapter(patch, models, predicted)
    del adapted.inputs["model"]
    return Inside(
        description="Show an SD 1.5 inpainting model what a named object would look like in the "
        "hole. The patched model goes to any sampler. Needs CLIP ViT-L/14 vision and CAT weights.",
        inputs=[
            Port("model", [(adapted, "model")]),
            Port("clip", [(predicted, "clip")]),
            Port("image", [(predicted, "image")]),
            Port("mask", [(predicted, "mask")]),
            Port("text", [(predicted, "text")]),
            Port("strength", [(adapted, "strength")]),
            Port("clip_name", [(vision, "clip_name")]),
            Port("weights", [(cat, "weights")]),
        ],
        output=("MODEL", adapted[0]),
    )


ALL = {"CAT Inpaint": cat_inpaint, "CAT Visual Prompt": cat_visual_prompt}


def write_blueprint(name: str, info: dict) -> None:
    """Write one; `info` is the host's /object_info."""
    text = json.dumps(blueprint(name, info), indent=1, ensure_ascii=False)
    (BLUEPRINTS / f"{name}.json").write_text(text + "\n")


def blueprint(name: str, info: dict) -> dict:
    """The file's content: a workflow of one node, and the subgraph that it stands for."""
    graph = Graph(info)
    inside = ALL[name](graph)
    canvas = graph.canvas(name)
    drawn = {node["id"]: node for node in canvas["nodes"]}
    links = []
    for number, origin, output, target, slot, type_ in canvas["links"]:
        links.append(_link(number, (origin, output), (target, slot), type_))
    inputs = []
    for slot, port in enumerate(inside.inputs):
        inputs.append(_inner_input(name, port, slot, drawn, links))
    output = _inner_output(name, inside.output, drawn, links)
    kind = _id(name, "subgraph")
    subgraph = {
        "id": kind,
        "version": 1,
        "state": {
            "lastGroupId": len(canvas["groups"]),
            "lastNodeId": canvas["last_node_id"],
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        "inputNode": {"id": INSIDE_IN, "bounding": [-200, 0, 120, 20 * len(inputs) + 40]},
        "outputNode": {"id": INSIDE_OUT, "bounding": [1500, 0, 120, 60]},
        "inputs": inputs,
        "outputs": [output],
        "widgets": [],
        "nodes": canvas["nodes"],
        "groups": canvas["groups"],
        "links": links,
        "extra": {},
        "category": CATEGORY,
        "description": inside.description,
    }
    return {
        "revision": 0,
        "last_node_id": canvas["last_node_id"] + 1,
        "last_link_id": 0,
        "nodes": [_outer_node(name, kind, inside, canvas["last_node_id"] + 1, inputs)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
    }


def _outer_node(name: str, kind: str, inside: Inside, id: int, inner: list[dict]) -> dict:
    inputs = []
    promoted = []
    for port, described in zip(inside.inputs, inner, strict=True):
        slot = {"name": port.name, "type": described["type"], "link": None}
        node, widget = port.targets[0]
        if described["is_widget"]:
            slot["widget"] = {"name": port.name}
            promoted.append([str(node.id), widget])
        del described["is_widget"]
        inputs.append(slot)
    output, _ = inside.output
    return {
        "id": id,
        "type": kind,
        "pos": [0, 0],
        "size": [340, 340],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": output, "type": output, "links": []}],
        "properties": {"proxyWidgets": promoted, "cnr_id": "cat-diffusion", "ver": "0.2.0"},
        "widgets_values": [],
        "title": name,
    }


def _inner_input(name: str, port: Port, slot: int, drawn: dict, links: list[dict]) -> dict:
    """One of the subgraph's inputs; its links are added to `links` and to the drawn nodes."""
    numbers = []
    for node, input_name in port.targets:
        at = [one["name"] for one in drawn[node.id]["inputs"]].index(input_name)
        target = drawn[node.id]["inputs"][at]
        target["link"] = len(links) + 1
        numbers.append(target["link"])
        links.append(_link(target["link"], (INSIDE_IN, slot), (node.id, at), target["type"]))
    return {
        "id": _id(name, port.name),
        "name": port.name,
        "type": target["type"],
        "linkIds": numbers,
        "pos": [-100, 20 * slot + 20],
        "is_widget": "widget" in target,
    }


def _inner_output(name: str, output: tuple[str, Output], drawn: dict, links: list[dict]) -> dict:
    kind, (origin, slot) = output
    number = len(links) + 1
    drawn[origin]["outputs"][slot]["links"].append(number)
    links.append(_link(number, (origin, slot), (INSIDE_OUT, 0), kind))
    return {
        "id": _id(name, "output"),
        "name": kind,
        "type": kind,
        "linkIds": [number],
        "pos": [1520, 20],
    }


def _link(number: int, origin: tuple[int, int], target: tuple[int, int], type_: str) -> dict:
    return {
        "id": number,
        "origin_id": origin[0],
        "origin_slot": origin[1],
        "target_id": target[0],
        "target_slot": target[1],
        "type": type_,
    }


def _first(graph: Graph, kind: str) -> PlacedNode:
    return next(node for node in graph.nodes if node.kind == kind)


def _id(name: str, part: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"cat-diffusion/blueprint/{name}/{part}"))
