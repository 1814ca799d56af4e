"""What all errors of the core have in common."""

import sys
from collections.abc import Iterable
from pathlib import Path


class CatError(Exception):
    """Something that a person can mend.

    The message says what was found, what was expected and what to do.
    """


def few(names: Iterable[str], most: int = 5) -> str:
    """The first of many names, for messages: "a, b, c, d, e and 7 more"."""
    names = list(names)
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def how_to_install(requirements: str, python: str | Path = sys.executable) -> str:
    """The command that installs one of the pack's requirements files into a Python."""
    file = Path(__file__).resolve().parents[1] / requirements
    return f'"{python}" -m pip install -r "{file}"'
