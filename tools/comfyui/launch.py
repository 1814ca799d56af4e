"""Start a command in ComfyUI's own Python, and set ComfyUI up there for code that imports it.

A command's file says what it takes; `enter_comfyui` may then run it again in another Python. Only
after that the command imports its body, which imports at its top what it needs.
"""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

from . import existing, install

COMFYUI = "CAT_DIFFUSION_COMFYUI"  # environment variable: ComfyUI's folder, set in its Python


def add_host_options(parser, installs: bool = True) -> None:
    """--comfyui and --python, for commands that run in a user's own ComfyUI, and --install.

    Args:
        installs: whether there is an --install; `enter_comfyui` asks for it.
    """
    parser.add_argument(
        "--comfyui",
        help="a ComfyUI folder (default: the one that this pack lies in, else the one that this "
        "Python belongs to, else the one that tools/demo.py made)",
    )
    parser.add_argument("--python", help="the Python that runs that ComfyUI")
    if installs:
        parser.add_argument(
            "--install",
            action="store_true",
            help="install what is missing: packages of requirements-*.txt into ComfyUI's Python "
            "and, where there is no ComfyUI, one of 6 GB into the cache; without it nothing is "
            "installed",
        )


def enter_comfyui(parser, arguments, *extras: str, optional: tuple[str, ...] = ()) -> None:
    """Return only in a ComfyUI's Python; elsewhere run this command again in there, and exit.

    Which ComfyUI, existing.py says. What is missing ends this with an error that says how to
    install it, unless --install was given.

    Args:
        extras: of each `requirements-<extra>.txt` without which the command cannot work.
        optional: of those that it can do without; only --install cares.
    """
    if COMFYUI in os.environ:
        return
    try:
        host = existing.find_host(arguments.comfyui, arguments.python)
        if host is None and arguments.install:
            host = install.prepare_host()
        if host is None:
            parser.error(
                "no ComfyUI was found: --comfyui names none, this pack does not lie in one, and "
                f"{sys.executable} belongs to none. Give --comfyui FOLDER, with --python if its "
                "Python lies elsewhere; or give --install, which puts a ComfyUI of 6 GB into "
                f"{install.cache_dir()}."
            )
        missing = existing.missing_requirements(host.python, extras)
        if arguments.install:
            missing += existing.missing_requirements(host.python, optional)
            for file in sorted({line.file for line in missing}):
                install.install_requirements(host.python, file)
        elif missing:
            parser.error(existing.say_what_is_missing(host.python, missing))
    except install.SetupError as error:
        parser.error(str(error))
    print(f"ComfyUI: {host.path}, with {host.python}", file=sys.stderr, flush=True)
    sys.exit(run_again(host))


def enter_python(parser, arguments, modules: dict[str, str], stays: bool = False) -> None:
    """Return in a Python that has some modules, for commands that do not import ComfyUI.

    That is this one, unless --comfyui, --python or the folder that this pack lies in says another.

    Args:
        modules: as they are imported -> as they are installed.
        stays: whether this Python does even where the pack lies in a ComfyUI.
    """
    if COMFYUI in os.environ:
        return
    named = arguments.comfyui or arguments.python
    if not stays:
        named = named or existing.around_the_pack()
    missing = existing.missing_modules(sys.executable, modules)
    if not named and not missing:
        return
    try:
        host = existing.find_host(arguments.comfyui, arguments.python)
    except install.SetupError as error:
        parser.error(str(error))
    if host is None:
        packages = " ".join(modules[name] for name in missing)
        parser.error(
            f"{sys.executable} has no {' and no '.join(missing)}. ComfyUI's Python has: name its "
            f"folder with --comfyui, or install with\n"
            f'    "{sys.executable}" -m pip install {packages}'
        )
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


@contextmanager
def importing():
    """Let Ctrl-C end this process at once: for start_host and the late import of a command's body.

    An exception would come out of whatever is being imported, and some modules take it for another.
    """
    before = signal.signal(signal.SIGINT, _stop_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop_at_once(*_) -> None:
    print("\nStopped before anything was read or written.", flush=True)
    os._exit(130)


def interruptible(main) -> None:
    """Run a command's main: Ctrl-C and SIGTERM end it after its clean-up, without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped.")
        sys.exit(130)
