"""What the user sees on the node that is running."""

import sys

import comfy.cli_args
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


def locale_of_user() -> str:
    """The language that the user has chosen for the canvas, such as "zh"; "en" where none is known.

    app/app_settings.py:11 (get_settings) and app/user_manager.py:59 (get_request_user_id), which
    looks at no request unless there are several users. Without them sentences are English.
    """
    # As in show_on_node.
    server = sys.modules.get("server")
    instance = server and getattr(server.PromptServer, "instance", None)
    users = getattr(instance, "user_manager", None)
    if users is None or comfy.cli_args.args.multi_user:
        return "en"
    locale = users.settings.get_settings(None).get("Comfy.Locale")
    return locale if isinstance(locale, str) else "en"


def progress_bar(total: int) -> comfy.utils.ProgressBar:
    """The bar on the node that is running.

    comfy/utils.py:1268 (ProgressBar). Without it the user sees no progress.
    """
    return comfy.utils.ProgressBar(total)
