"""What holds for whatever is read or asked for: a right answer or a sentence, soon, in little room.

Hypothesis draws what is tried, the same each time; `tools/test.py --soak` draws other and more.
"""

import signal
import sys
from contextlib import contextmanager
from pathlib import Path

LONGEST = 700  # letters of a message that a person reads
SECONDS = 60  # for one answer, on a busy machine
MEGABYTE = 1 << 20
PEAK = Path("/proc/self/status")  # Linux's
RESET = Path("/proc/self/clear_refs")


def flaw(text: str, longest: int = LONGEST) -> str | None:
    """What is wrong with a message, or None."""
    for name, found in {
        "no sentence": not text.endswith((".", "?", '"')),  # a command to copy ends in "
        "too long": len(text) > longest,
        "several lines": "\n" in text,
        "cannot be written": any("\ud800" <= letter <= "\udfff" for letter in text),
    }.items():
        if found:
            return f"{name}: {text!r:.300}"
    return None


@contextmanager
def bounded(megabytes: int = 300):
    """Fail where the block takes more than a minute or adds more than so much memory.

    Both are told where the system tells them.
    """
    if sys.platform == "win32":
        yield
        return

    def late(*_):
        raise AssertionError(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    start = _reset_peak()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if start is not None:
        taken = _peak() - start
        assert taken < megabytes * MEGABYTE, f"it took {taken / MEGABYTE:.0f} MB more"


def _reset_peak() -> int | None:
    try:
        RESET.write_text("5")
        return _peak()
    except OSError:
        return None


def _peak() -> int:
    """Bytes that this process has held at most since the last reset."""
    for line in PEAK.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no peak")
