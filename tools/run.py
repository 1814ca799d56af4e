"""Run one of the tools that make what the repository carries, in ComfyUI's own Python.

python tools/run.py [--comfyui PATH] [--python PYTHON] NAME [its arguments]
python tools/run.py NAME --help
"""

import argparse
import importlib
import sys

from comfyui import launch

# Name -> what it is for, and the requirements files that it needs.
TOOLS = {
    "demo_model.recipe": ("train the demo model from nothing", ["train"]),
    "demo_model.score": ("let the demo model fill held-out holes, and a judge look", []),
    "demo_model.ablation": ("the paper's ablation on drawn scenes", ["train", "evaluate"]),
    "demo_model.scenes": ("write drawn scenes with a manifest, or a sheet of them", []),
    "demo_model.classifier": ("train the judge of the demo model, and say how good it is", []),
    "demo_model.random_checkpoint": ("write random weights in the official layout", []),
    "benchmark.load_once": ("load a checkpoint once, and say what it took", []),
    "release.workflows": ("write the example workflows and their thumbnails", ["train"]),
    "release.node_pictures": ("draw the pictures of the help pages", []),
}


def main() -> int:
    lines = ["NAME is one of"]
    for name, (purpose, _) in TOOLS.items():
        lines.append(f"  {name:<30}{purpose}")
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
    _, requirements = TOOLS[arguments.name]
    launch.enter_comfyui(parser, arguments, *requirements)
    launch.start_host("--cpu" in arguments.arguments or not launch.has_gpu())
    # The tool reads its own command line, and names itself in its --help.
    sys.argv = [arguments.name, *arguments.arguments]
    return importlib.import_module(arguments.name).main()


if __name__ == "__main__":
    launch.interruptible(main)
