"""What the user sees on the node that is running."""

import comfy.utils
from comfy_execution.utils import get_executing_context


def show_on_node(text: str) -> None:
    """Show a sentence on the node that is running; nothing where none is.

    comfy_execution/utils.py:18 (get_executing_context) and server.py:1469 (send_progress_text).
    Without them the sentence is in the log alone.
    """
    running = get_executing_context()
    if running is None:
        return
    # Late: tools run without the server, which takes seconds to import and imports `utils` by that
    # common name. Where a node runs, the host has imported it long ago.
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, running.node_id)


def progress_bar(total: int) -> comfy.utils.ProgressBar:
    """The bar on the node that is running.

    comfy/utils.py:1268 (ProgressBar). Without it the user sees no progress.
    """
    return comfy.utils.ProgressBar(total)
