"""What all errors of the core have in common."""

from collections.abc import Iterable


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
