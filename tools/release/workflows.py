"""The example workflows, each written twice: for the canvas and, under workflows/api, for scripts.

    python tools/run.py release.workflows [--thumbnails] [--only NAME ...]

Asks a real ComfyUI for the nodes' inputs, so that links and widgets are in the order that it
expects. Writes the blueprints of subgraphs as well. --thumbnails also runs every workflow on the
demo model and keeps the picture.
"""

import argparse
import json
import tempfile
from pathlib import Path

from comfyui.local_server import LocalServer, make_base
from release import blueprints, demo_workflows, photo_workflows, training_workflow
from release.graph import Graph
from release.workflow_runs import FOLDER, NOT_SHOWN, examples, thumbnail

WORKFLOWS = {
    "cat_demo": demo_workflows.demo,
    "cat_weights": photo_workflows.weights,
    "cat_inpaint": photo_workflows.inpaint,
    "cat_compare": photo_workflows.compare,
    "cat_reference": photo_workflows.reference,
    "cat_lora_controlnet": photo_workflows.lora_controlnet,
    "cat_two_objects": demo_workflows.two_objects,
    "cat_crop": photo_workflows.crop,
    "cat_custom_checkpoint": photo_workflows.custom_checkpoint,
    "cat_train": training_workflow.training,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--thumbnails", action="store_true", help="also run them and write their pictures"
    )
    parser.add_argument(
        "--only", choices=WORKFLOWS, nargs="+", default=list(WORKFLOWS), help="these instead of all"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_base(base)
        examples(base / "input/my_examples")
        with LocalServer(base, "--cpu", "--use-pytorch-cross-attention") as server:
            info = server.get("/object_info")
            for name in arguments.only:
                write(name, info)
                if arguments.thumbnails and name not in NOT_SHOWN:
                    thumbnail(server, name)
                print(name, flush=True)
            for name in blueprints.ALL:
                blueprints.write_blueprint(name, info)
                print(name, flush=True)
    return 0


def write(name: str, info: dict, folder: Path = FOLDER) -> None:
    """Write both forms of a workflow; `info` is the host's /object_info."""
    graph = Graph(info)
    WORKFLOWS[name](graph)
    canvas = json.dumps(graph.canvas(name), indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(canvas + "\n")
    (folder / f"api/{name}.json").write_text(one_node_a_line(graph.api()))


def one_node_a_line(prompt: dict) -> str:
    """JSON of an API workflow."""
    lines = []
    for id, node in prompt.items():
        lines.append(f"  {json.dumps(id)}: {json.dumps(node, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
