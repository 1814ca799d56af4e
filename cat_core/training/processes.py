"""The processes of a run, as far as they share out work before the first step."""

from dataclasses import dataclass
from typing import Protocol


class Processes(Protocol):
    """The processes that fill a cache together, as accelerate's PartialState tells of them."""

    num_processes: int
    process_index: int

    def wait_for_everyone(self) -> None:
        """Return when all have called this."""
        ...


@dataclass
class Alone:
    """One process, which waits for nobody."""

    num_processes: int = 1
    process_index: int = 0

    def wait_for_everyone(self) -> None:
        """Return at once."""
