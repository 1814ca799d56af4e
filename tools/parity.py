"""Compare this pack with tensors that the official implementation produced, in the real ComfyUI.

    python tools/parity.py --goldens DIR [--comfyui PATH] [--python PYTHON]

Prints one line a case and exits with 1 if any error exceeds its bound.
"""

import argparse
from pathlib import Path

from comfyui import launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--goldens",
        required=True,
        type=Path,
        help="folder with index.json and its .safetensors files",
    )
    launch.add_host_options(parser)
    arguments = parser.parse_args()
    if not (arguments.goldens / "index.json").is_file():
        parser.error(f"{arguments.goldens} has no index.json; expected a folder of golden tensors")
    launch.enter_comfyui(parser, arguments)
    with launch.importing():
        launch.start_host()
        from official import golden_cases

    return golden_cases.command(parser, arguments.goldens)


if __name__ == "__main__":
    launch.interruptible(main)
