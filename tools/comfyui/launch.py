"""Start a command in ComfyUI's own Python, and set ComfyUI up there for code that imports it.

A command's file says what it takes; `enter_comfyui` may then run it again in another Python. Only
after that the command imports its body, which imports at its top what it needs.
"""

import os
import signal
import subprocess
import sys

from . import ROOT, install

COMFYUI = "CAT_DIFFUSION_COMFYUI"  # environment variable: ComfyUI's folder, set in its Python


def add_host_options(parser) -> None:
    """--comfyui and --python, for commands that run in a user's own ComfyUI."""
    parser.add_argument(
        "--comfyui", help="an existing ComfyUI folder; installed into the cache if not given"
    )
    parser.add_argument("--python", help="the Python that runs that ComfyUI")


def enter_comfyui(parser, arguments, *extras: str) -> None:
    """Return only in a ComfyUI's Python; elsewhere run this command again in there, and exit.

    That is the ComfyUI of --comfyui, else the cache's, installed first if need be, each of
    `requirements-<extra>.txt` with it.
    """
    if COMFYUI in os.environ:
        return
    requirements = [ROOT / f"requirements-{extra}.txt" for extra in extras]
    path = getattr(arguments, "comfyui", None)
    python = getattr(arguments, "python", None)
    try:
        host = install.chosen_host(path, python, *requirements)
    except install.SetupError as error:
        parser.error(str(error))
    sys.exit(run_again(host))


def run_again(host: install.Host) -> int:
    """Run this command in the host's Python; returns its exit code where this process lives on."""
    command = [str(host.python), *sys.argv]
    environment = {**os.environ, COMFYUI: str(host.path)}
    if os.name != "nt":
        os.execve(command[0], command, environment)  # signals then reach the one process there is
    return subprocess.run(command, env=environment).returncode


def start_host(cpu: bool = True) -> None:
    """Make ComfyUI importable in this process, and set before its import what its main.py would.

    Args:
        cpu: do not use a GPU, and compute attention in the way that is fastest on a CPU.
    """
    if COMFYUI not in os.environ:
        sys.exit(f"Set {COMFYUI} to a ComfyUI folder and run this with that ComfyUI's Python.")
    if os.environ[COMFYUI] not in sys.path:
        sys.path.insert(0, os.environ[COMFYUI])
    # Late: it imports ComfyUI, which can be found only now.
    from cat_diffusion.nodes.host import startup

    startup.configure(cpu)


# The launcher runs in any Python, which may have no PyTorch: below, each imports it for itself.


def has_gpu() -> bool:
    """Whether PyTorch finds one."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def has_cuda() -> bool:
    """Whether PyTorch finds a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def limit_threads(threads: int | None) -> None:
    """Let PyTorch use that many CPU threads; None leaves it as it is."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def interruptible(main) -> None:
    """Run a command's main: Ctrl-C and SIGTERM end it after its clean-up, without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)
