"""Run the tests on real ComfyUI releases, installing them into a cache on first use.

    python tools/test.py              style, the tests, again on the older ComfyUI
    python tools/test.py --fast       style, core and node tests: for daily work
    python tools/test.py tests/core/test_weights.py::test_x
    python tools/test.py -k word      or --lf, -x and whatever else pytest knows
    python tools/test.py --release    before a release: what takes minutes, newest ComfyUI, checks
    python tools/test.py --soak       for hours: other draws, kills, full disks and many prompts

Without arguments of pytest: ruff and pyright, all tests on ComfyUI 0.30.0 that do not need minutes
(those marked `full` wait for a release), the node tests again with its dynamic VRAM, then node and
server tests on 0.16.3. With them: one run, on 0.30.0 or on --host.
"""

import argparse
import os
import subprocess
import time

from comfyui import ROOT, install, launch

TESTS = ROOT / "tests"
OLDER = "0.16.3"
# The newer host turns it on by itself on a GPU. The files left out build networks of their own,
# or run tools, which do without it.
DYNAMIC_VRAM = [
    "nodes",
    "--dynamic-vram",
    "--ignore=nodes/test_bench.py",
    "--ignore=nodes/test_demo_model.py",
    *("-m", "not once"),
]
MOST_LANES = 4  # each with a ComfyUI of its own, which takes up to 3 GB
NOT_FULL = ["-m", "not full"]
NOT_SLOW = ["-m", "not slow"]
FAST = ["core", "nodes", *NOT_SLOW]
EVERYTHING = [
    (install.NEWEST, NOT_FULL),
    (install.NEWEST, DYNAMIC_VRAM),
    (OLDER, ["nodes", "server", "-m", "not full and not once"]),
]

# The symbols first: what has moved in a new host is named before all that follows from it.
RELEASE = [
    ["nodes/test_host_symbols.py"],
    ["nodes", "server", *NOT_FULL, "--deselect=nodes/test_host_symbols.py"],
    ["-m", "full"],
]
SOAKED = ["-s", *NOT_FULL, "--hypothesis-profile=soak"]
SOAKED += ["core/test_fuzzed_readers.py", "nodes/test_odd_inputs.py", "server/test_soak.py"]
# Environment variables of tests that run only when they are asked for.
CHECKS = "CAT_DIFFUSION_CHECKS"  # the folder of install.CHECKS
SOAK = "CAT_DIFFUSION_SOAK"


def main() -> int:
    usage = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=usage[0],
        epilog=usage[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", choices=install.SOURCES, help="only this ComfyUI release")
    parser.add_argument(
        "--release",
        action="store_true",
        help="node and server tests on the newest ComfyUI that the package index offers, the "
        "tests that take minutes, comfy-import-guard and comfy-lint",
    )
    parser.add_argument(
        "--soak",
        action="store_true",
        help="the long forms of the tests: fuzzing by chance, kills, full disks, 300 prompts",
    )
    parser.add_argument("--fast", action="store_true", help="style, core and node tests only")
    arguments, pytest_arguments = parser.parse_known_args()
    failed = []
    try:
        if arguments.release:
            os.environ[CHECKS] = str(install.prepare_checks())
            newest = install.look_up_newest()
            runs = [(newest, selection + pytest_arguments) for selection in RELEASE]
        elif arguments.soak:
            os.environ.setdefault(SOAK, "1")
            runs = [(arguments.host or install.NEWEST, SOAKED + pytest_arguments)]
        else:
            runs = plan(arguments.host, arguments.fast, pytest_arguments)
        lanes = 1 if pytest_arguments or arguments.soak else min(os.cpu_count() or 1, MOST_LANES)
        is_part = pytest_arguments or arguments.host or arguments.release or arguments.soak
        if not is_part and not style(prepare(install.NEWEST)):
            failed.append("style")
        for version, selection in runs:
            if not run_pytest(version, prepare(version), selection, lanes):
                failed.append(version)
    except install.SetupError as error:
        parser.error(str(error))
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


def plan(host: str | None, fast: bool, pytest_arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Which releases run, each with arguments for pytest."""
    version = host or install.NEWEST
    if pytest_arguments:
        inside = [below_tests(argument) for argument in pytest_arguments]
        names_paths = any((TESTS / argument.partition("::")[0]).exists() for argument in inside)
        if not fast:
            return [(version, inside)]
        return [(version, NOT_SLOW + inside if names_paths else FAST + inside)]
    if fast:
        return [(version, FAST)]
    if host:
        return [(host, [])]
    return EVERYTHING


def below_tests(argument: str) -> str:
    """A path as written from the checkout -> as pytest wants it, which runs in tests/."""
    path, separator, name = argument.partition("::")
    if path.rstrip("/") == "tests":
        return "."
    inside = path.removeprefix("tests/")
    return inside + separator + name if (TESTS / inside).exists() else argument


def prepare(version: str) -> install.Host:
    """The host, with what the tests need; raises SetupError."""
    host = install.prepare_host(version)
    install.require(host, TESTS / "requirements.txt")
    return host


def style(host: install.Host) -> bool:
    """Whether ruff finds nothing to format or mend, and pyright no wrong type."""
    environment = {**os.environ, "PYTHONPATH": str(host.path)}  # where pyright finds comfy
    commands = (
        ("ruff", "format", "--check", "--quiet"),
        ("ruff", "check", "--quiet"),
        ("basedpyright", "--level", "error", "--pythonpath", host.python),
    )
    clean = True
    for program, *options in commands:
        command = [host.python, "-m", program, *options]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        print(f"===== {program} {options[0]}: {'passed' if code == 0 else 'FAILED'} =====")
        clean = clean and code == 0
    return clean


def run_pytest(version: str, host: install.Host, selection: list[str], lanes: int = 1) -> bool:
    """Run the selected tests on a host, files side by side in lanes; whether they passed."""
    print(f"\n===== ComfyUI {version}: pytest {' '.join(selection)} =====", flush=True)
    start = time.monotonic()
    cache = f"cache_dir={install.cache_dir() / f'pytest-{version}'}"  # for --lf
    command = [host.python, "-m", "pytest", "-o", cache, *selection]
    environment = {**os.environ, launch.COMFYUI: str(host.path)}
    if lanes > 1:
        command += ["-n", str(lanes), "--dist", "loadgroup"]
        threads = max((os.cpu_count() or 1) // lanes, 1)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    code = subprocess.run(command, cwd=TESTS, env=environment).returncode
    result = "passed" if code == 0 else f"FAILED ({code})"
    print(f"===== ComfyUI {version}: {result} in {time.monotonic() - start:.0f} s =====")
    return code == 0


if __name__ == "__main__":
    launch.interruptible(main)
