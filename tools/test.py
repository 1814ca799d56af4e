"""Run all tests on real ComfyUI releases, installing them into a cache on first use.

    python tools/test.py [--host 0.30.0|0.16.3] [pytest arguments]

Without --host: everything on ComfyUI 0.30.0, the node tests again with its dynamic VRAM, then node and server tests on 0.16.3.
"""

import argparse
import os
import subprocess
import time

from comfyui import ROOT, install, launch

TESTS = ROOT / "tests"
# On a GPU the newer host has it on. The files left out build networks of their own, or run tools, which do without it.
DYNAMIC_VRAM = [
    "nodes",
    "--dynamic-vram",
    "--ignore=nodes/test_bench.py",
    "--ignore=nodes/test_demo_model.py",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--host", choices=install.SOURCES, help="only this ComfyUI release, all tests"
    )
    arguments, pytest_arguments = parser.parse_known_args()
    plans = [
        (install.NEWEST, []),
        (install.NEWEST, DYNAMIC_VRAM),
        ("0.16.3", ["nodes", "server", "-m", "not full"]),
    ]
    if arguments.host:
        plans = [(arguments.host, [])]
    failed = []
    if any((TESTS / word.split("::")[0]).exists() for word in pytest_arguments):
        plans = [
            (version, []) for version in dict.fromkeys(version for version, _ in plans)
        ]  # named tests instead of the plan's
    for version, chosen in plans:
        start = time.monotonic()
        try:
            host = install.prepare_host(version)
            install.require(host, TESTS / "requirements.txt")
        except install.SetupError as error:
            parser.error(str(error))
        print(
            f"\n===== ComfyUI {version} (ready after {time.monotonic() - start:.1f} s) =====",
            flush=True,
        )
        start = time.monotonic()
        code = subprocess.run(
            [host.python, "-m", "pytest", *chosen, *pytest_arguments],
            cwd=TESTS,
            env={**os.environ, launch.COMFYUI: str(host.path)},
        ).returncode
        print(
            f"===== ComfyUI {version}: {'passed' if code == 0 else f'FAILED ({code})'} "
            f"in {time.monotonic() - start:.0f} s =====",
            flush=True,
        )
        failed += [version] * (code != 0)
    return int(bool(failed))


if __name__ == "__main__":
    launch.interruptible(main)
