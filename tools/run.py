"""Run one of the tools that make what the repository carries, in ComfyUI's own Python.

python tools/run.py [--comfyui PATH] [--python PYTHON] NAME [its arguments]
python tools/run.py NAME --help
"""

import argparse
import importlib
import sys
from typing import NamedTuple

from comfyui import launch


class Tool(NamedTuple):
    """What a tool is for, and what it needs of ComfyUI's Python."""

    purpose: str
    requirements: tuple[str, ...] = ()  # requirements-<name>.txt
    gpu: bool = False  # computes on one unless it is told --cpu


TOOLS = {
    "demo_model.recipe": Tool("train the demo model from nothing", ("train",), gpu=True),
    "demo_model.world_recipe": Tool(
        "train the demo model on things in photographs", ("train",), gpu=True
    ),
    "demo_model.world_sources": Tool("fetch the things and photographs of its world", ("world",)),
    "demo_model.world_judge": Tool("train the judge of things in photographs", gpu=True),
    "demo_model.world_score": Tool(
        "fill held-out holes in photographs, and a judge looks", gpu=True
    ),
    "demo_model.score": Tool("let the demo model fill held-out holes, and a judge look", gpu=True),
    "demo_model.ablation": Tool(
        "the paper's ablation on drawn scenes", ("train", "evaluate"), gpu=True
    ),
    "demo_model.scenes": Tool("write drawn scenes with a manifest, or a sheet of them"),
    "demo_model.classifier": Tool("train the demo model's judge, and say how good it is"),
    "demo_model.random_checkpoint": Tool("write random weights in the official layout"),
    "benchmark.load_once": Tool("load a checkpoint once, and say what it took", gpu=True),
    "release.workflows": Tool("write the example workflows and their thumbnails", ("train",)),
    "release.node_pictures": Tool("draw the pictures of the help pages"),
}


def main() -> int:
    lines = ["NAME is one of"]
    for name, tool in TOOLS.items():
        lines.append(f"  {name:<30}{tool.purpose}")
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    launch.add_host_options(parser)
    parser.add_argument("name", choices=TOOLS, nargs="?", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of that tool")
    arguments = parser.parse_args()
    if arguments.name is None:
        parser.print_help()
        return 2
    tool = TOOLS[arguments.name]
    launch.enter_comfyui(parser, arguments, *tool.requirements)
    with launch.importing():
        on_cpu = not tool.gpu or "--cpu" in arguments.arguments or not launch.has_gpu()
        launch.start_host(on_cpu)
        body = importlib.import_module(arguments.name)
    # The tool reads its own command line, and names itself in its --help.
    sys.argv = [f"run.py {arguments.name}", *arguments.arguments]
    return body.main()


if __name__ == "__main__":
    launch.interruptible(main)
