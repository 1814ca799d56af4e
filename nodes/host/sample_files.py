"""The host's folder for pictures that the page shows, where the sample photograph is laid."""

import logging
import os

import folder_paths
from PIL import Image

from . import symbols

log = logging.getLogger(__name__)


def lay_out(name: str, picture: Image.Image) -> None:
    """Write a picture into the host's temporary folder, so that the page can show it.

    The input folder is the user's, and this one the host empties whenever it starts.
    """
    folder = folder_paths.get_temp_directory()
    try:
        os.makedirs(folder, exist_ok=True)
        picture.save(os.path.join(folder, name), compress_level=1)
    except OSError as error:
        log.warning("CAT-Diffusion: cannot write %s into %s (%s).", name, folder, error)


def path_of(annotated: str) -> str:
    """Where a picture lies that a loader names, such as "a.png [temp]"; "" if it is nowhere.

    Outside the folder of that kind there is none: the host would follow an absolute path, or "..".
    """
    name, folder = folder_paths.annotated_filepath(annotated)
    folder = os.path.abspath(folder or folder_paths.get_input_directory())
    path = os.path.abspath(os.path.join(folder, name))
    is_inside = path.startswith(os.path.join(folder, ""))
    return path if is_inside and os.path.isfile(path) else ""


def load_picture(annotated: str) -> tuple:
    """IMAGE and MASK of a picture, as the host's Load Image reads them.

    Raises ValueError: the file is no picture.
    """
    try:
        return symbols.run_stock_node("LoadImage", image=annotated)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{annotated} cannot be read as a picture ({error}). Choose another file, or save it "
            "again as PNG."
        ) from error
