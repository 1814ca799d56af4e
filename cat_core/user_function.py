"""A function of a Python file that the user names on the command line."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from .errors import CatError


class FunctionError(CatError):
    """There is no such function; the message says what was found and what to do."""


def load_function(file: Path, name: str, arguments: str) -> Callable:
    """Run the file and take the function from it.

    Args:
        arguments: that it is called with, as an error says them.

    Raises FunctionError.
    """
    if not file.is_file():
        raise FunctionError(
            f"{file} is not a file, expected Python with a function {name}({arguments})."
        )
    spec = importlib.util.spec_from_file_location(f"user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise FunctionError(f"{file} is not called like a Python file; expected NAME.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise FunctionError(
            f"{file} cannot be imported ({first_line(error)}). Run this with the Python that has "
            "what the file needs, or install that there."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise FunctionError(f"{file} has no function {name}; expected {name}({arguments}).")
    return function


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
