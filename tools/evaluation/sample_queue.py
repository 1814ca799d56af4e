"""Samples for several threads, which may give them back."""

import threading
from collections.abc import Iterator

from cat_diffusion.cat_core.data.manifest import Record


class SampleQueue:
    """A manifest's records, each until it is done; one that lost its server comes again.

    `over` is set when all are done, or when the run was stopped.
    """

    def __init__(self, records: Iterator[Record]):
        self.over = threading.Event()
        self.error: Exception | None = None  # what stopped the run
        self._records = records
        self._returned: list[tuple[Record, int]] = []
        self._working = 0  # samples taken and neither done nor given back
        self._changed = threading.Condition()  # guards all of the above

    def take(self) -> tuple[Record, int] | None:
        """The next record, and how often it lost its server; None when nothing is left to do."""
        with self._changed:
            while not self.over.is_set():
                taken = self._next()
                if taken is not None:
                    self._working += 1
                    return taken
                if self._working == 0:
                    self.over.set()
                    self._changed.notify_all()
                # What others still work on may come back.
                self._changed.wait(1)
        return None

    def done(self) -> None:
        """One that was taken has its result, or never will."""
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def give_back(self, record: Record, losses: int) -> None:
        """One that was taken has lost its server, `losses` times so far."""
        with self._changed:
            self._working -= 1
            self._returned.append((record, losses))
            self._changed.notify_all()

    def stop(self, error: Exception) -> None:
        """Let no thread take another sample; the first error is kept."""
        with self._changed:
            self.error = self.error or error
            self.over.set()
            self._changed.notify_all()

    def _next(self) -> tuple[Record, int] | None:
        if self._returned:
            return self._returned.pop()
        record = next(self._records, None)
        return None if record is None else (record, 0)
