"""What a tool does once it runs in ComfyUI's own Python: import the host and load this pack into it."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = "CAT_DIFFUSION_COMFYUI"  # environment variable: the host's folder, set for the process inside


def rerun(host, script: str, arguments: list[str]) -> int:
    """Run `script` again in the host's Python; returns its exit code where this process goes on to live."""
    command, environment = [str(host.python), script, *arguments], {**os.environ, COMFYUI: str(host.path)}
    if os.name != "nt":
        os.execve(command[0], command, environment)  # signals then reach the one process there is
    return subprocess.run(command, env=environment).returncode


def add_host_options(parser) -> None:
    """--comfyui and --python, for tools that run in a user's own ComfyUI."""
    parser.add_argument("--comfyui", help="an existing ComfyUI folder; installed into the cache if not given")
    parser.add_argument("--python", help="the Python that runs that ComfyUI")


def ensure_host(parser, arguments, script: str, *extras: str) -> None:
    """Return only in a ComfyUI's Python; elsewhere run `script` again in there, then exit as it did.

    That is the ComfyUI of --comfyui, else the cache's, installed first if need be with each `requirements-<extra>.txt`.
    """
    if COMFYUI in os.environ:
        return
    import host as hosts
    requirements = [ROOT / f"requirements-{extra}.txt" for extra in extras]
    try:
        host = hosts.chosen_host(getattr(arguments, "comfyui", None), getattr(arguments, "python", None), *requirements)
    except hosts.SetupError as error:
        parser.error(str(error))
    sys.exit(rerun(host, script, sys.argv[1:]))


def interruptible(main) -> None:
    """Run a tool's main: Ctrl-C and SIGTERM end it after its clean-up, without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)


def load_pack(cpu: bool = True):
    """Import ComfyUI, then this pack as the package `cat_diffusion`; returns the package."""
    if "cat_diffusion" in sys.modules:
        return sys.modules["cat_diffusion"]
    if COMFYUI not in os.environ:
        sys.exit(f"Set {COMFYUI} to a ComfyUI folder and run this with that ComfyUI's Python.")
    if os.environ[COMFYUI] not in sys.path:
        sys.path.insert(0, os.environ[COMFYUI])
    import comfy.cli_args
    comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = cpu  # the fastest attention on a CPU
    spec = importlib.util.spec_from_file_location("cat_diffusion", ROOT / "__init__.py",
                                                  submodule_search_locations=[str(ROOT)])
    pack = sys.modules["cat_diffusion"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack
