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
    text = ", ".join(quoted(name) for name in names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def quoted(text: object, most: int = 300) -> str:
    """What others wrote, as a sentence repeats it: in one line, readable, not too long."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
    return line if len(line) <= most else line[:most] + "..."


def how_to_install(requirements: str, python: str | Path = sys.executable) -> str:
    """The command that installs one of the pack's requirements files into a Python."""
    file = Path(__file__).resolve().parents[1] / requirements
    return f'"{python}" -m pip install -r "{file}"'
