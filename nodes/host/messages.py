"""What the user reads on a node: sentences, errors and progress."""

import logging
from contextlib import contextmanager

import comfy.utils

from ...cat_core.errors import CatError

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Show a sentence on the node that is running, and in the log."""
    from comfy_execution.utils import get_executing_context

    log.info("CAT-Diffusion: %s", text)
    context = get_executing_context()
    if context is not None:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(text, context.node_id)


@contextmanager
def plain_errors():
    """Raise the core's errors as ValueError: the host puts the module path of other classes before the sentence."""
    try:
        yield
    except CatError as error:
        raise ValueError(str(error)) from error


def progress_bar(total: int) -> comfy.utils.ProgressBar:
    """The bar on the node that is running."""
    return comfy.utils.ProgressBar(total)
