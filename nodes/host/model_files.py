"""The host's folders: weight files in models/cat_diffusion, examples in the input folder."""

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...cat_core import weights
from ...cat_core.weights import Checkpoint
from . import symbols

FOLDER = "cat_diffusion"
EXTENSIONS = (".safetensors", ".ckpt")
BUNDLED = Path(__file__).resolve().parents[2] / "models"  # the pack's own demo model

log = logging.getLogger(__name__)


def register_folder() -> None:
    """Make models/cat_diffusion known, and the pack's own demo model.

    Paths that the user configured for it are kept. The host's own function for this would list
    files of every kind: folder_paths.py:389 (set).
    """
    own = os.path.join(folder_paths.models_dir, FOLDER)
    configured = folder_paths.folder_names_and_paths.get(FOLDER, ([],))[0]
    folders = list(dict.fromkeys([*configured, own, str(BUNDLED)]))
    folder_paths.folder_names_and_paths[FOLDER] = (folders, set(EXTENSIONS))
    try:
        os.makedirs(own, exist_ok=True)
    except OSError as error:
        log.warning(
            "CAT-Diffusion: cannot create %s (%s); create it yourself for CAT files.", own, error
        )


def list_files(usable: Callable[[set[str]], bool], pickles: bool = False) -> list[str]:
    """Names of the files in models/cat_diffusion whose parts are `usable`.

    Args:
        pickles: list .ckpt files as well; what one holds only reading it tells.
    """

    def fits(name: str) -> bool:
        path = folder_paths.get_full_path(FOLDER, name)
        if path is None:
            return False
        if not name.lower().endswith(".safetensors"):
            return pickles
        status = os.stat(path)
        return usable(_parts_inside(path, status.st_mtime_ns, status.st_size))

    return [name for name in folder_paths.get_filename_list(FOLDER) if fits(name)]


@lru_cache(maxsize=1000)
def _parts_inside(path: str, mtime: int, size: int) -> set[str]:
    return weights.parts_inside(path)


def missing_file(name: str | None, what: str) -> str | None:
    """A sentence about a file that is not there, or None.

    Args:
        name: None where another node supplies it.
    """
    if name is None:
        return None
    path = folder_paths.get_full_path(FOLDER, name)
    if path is not None:
        return _foreign_ending(name, path)
    folders = " or ".join(folder_paths.get_folder_paths(FOLDER))
    return (
        f"There is no {name} in {folders}. Put {what} there and press R, or choose "
        "another file; cat_demo_model.safetensors, a small demo model, comes with the pack."
    )


def _foreign_ending(name: str, path: str) -> str | None:
    """A sentence about a file that is not one of weights by its name or its link's, or None.

    Stores that name files by their content, as Hugging Face's cache, link to names without ending.
    """
    target = os.path.realpath(path)
    endings = [os.path.splitext(name)[1].lower(), os.path.splitext(target)[1].lower()]
    if endings[0] in EXTENSIONS and endings[1] in (*EXTENSIONS, ""):
        return None
    leads = "" if endings[0] not in EXTENSIONS else " links to a file that"
    return (
        f"{name!r}{leads} ends neither in {' nor in '.join(EXTENSIONS)}. Choose a file of weights."
    )


def fingerprint(name: str) -> tuple:
    """Changes when the file does."""
    path = full_path(name)
    status = os.stat(path)
    return path, status.st_mtime_ns, status.st_size


def full_path(name: str) -> str:
    """Where a file of models/cat_diffusion lies.

    Raises FileNotFoundError, and ValueError for one whose ending is not of weights.
    """
    path = folder_paths.get_full_path_or_raise(FOLDER, name)
    foreign = _foreign_ending(name, path)
    if foreign:
        raise ValueError(foreign)
    return path


def read(name: str) -> Checkpoint:
    """Read and check a file of models/cat_diffusion; raises WeightsError."""
    return read_path(full_path(name))


def read_path(path) -> Checkpoint:
    """As `read`, by path; NaN and Inf show when a part is built."""
    copies = symbols.maps_no_files()
    # The host's own reader where it pages weights into the GPU itself, or may not map files.
    host_reads = copies or symbols.streams_files()
    return weights.read(
        path, symbols.read_tensors if host_reads else None, mapped=not copies, numbers=False
    )


def new_path(filename_prefix: str) -> str:
    """A name in models/cat_diffusion that no file has yet, counted up as the host's savers do."""
    root = folder_paths.get_folder_paths(FOLDER)[0]
    if os.path.basename(os.path.normpath(filename_prefix)).strip(". ") == "":
        raise ValueError(
            f"filename_prefix is {filename_prefix!r}; "
            "expected the beginning of a file's name, such as my_cat."
        )
    try:
        os.makedirs(root, exist_ok=True)
        folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, root)
    except OSError as error:
        raise ValueError(
            f"Cannot write to {root} ({error.strerror}). Check the folder's permissions."
        ) from error
    except Exception as error:  # how folder_paths.py:557 (raise) refuses a path
        raise ValueError(
            f"filename_prefix {filename_prefix!r} leads out of {root}. "
            "Give a name, or subfolder/name."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is read-only; the weights go there. Check its permissions.")
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def input_folders() -> list[str]:
    """All subfolders of the host's input folder."""
    return folder_paths.get_input_subfolders()


def input_folder(name: str) -> tuple[Path, tuple]:
    """A subfolder of the host's input folder, and a fingerprint of the files below it.

    Raises ValueError if there is none, or if something in it leads out of it.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    path = Path(root, name).resolve()
    if not name.strip() or path == root or not path.is_relative_to(root):
        raise ValueError(
            f"{name!r} is not a subfolder of {root}. "
            "Put the examples into a folder of their own in there."
        )
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {name} in {root}. "
            "Put the examples there and press R to refresh the list."
        )
    files = []
    for parent, folders, names in os.walk(path):
        for entry in folders + names:
            _check_inside(Path(parent, entry), path)
        for file in names:
            entry = Path(parent, file)
            status = entry.lstat()
            files.append((str(entry.relative_to(path)), status.st_size, status.st_mtime_ns))
    return path, tuple(sorted(files))


def _check_inside(entry: Path, folder: Path) -> None:
    if not entry.resolve().is_relative_to(folder):
        raise ValueError(
            f"{entry} is a link to something outside of {folder}. "
            "Copy the files into the folder instead."
        )
