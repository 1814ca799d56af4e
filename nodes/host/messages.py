"""What the user reads on a node: sentences, errors and progress."""

import logging
from contextlib import contextmanager

from ...cat_core.errors import CatError
from . import symbols

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Show a sentence on the node that is running, and in the log."""
    log.info("CAT-Diffusion: %s", text)
    symbols.show_on_node(text)


@contextmanager
def plain_errors():
    """Raise the core's errors as ValueError.

    The host puts the module path of other classes before the sentence: execution.py:630
    (full_type_name).
    """
    try:
        yield
    except CatError as error:
        raise ValueError(str(error)) from error


def progress_bar(total: int):
    """The bar on the node that is running."""
    return symbols.progress_bar(total)
