"""How far a run over many pictures is."""

import sys

from tqdm import tqdm


def picture_bar(total: int) -> tqdm:
    """A bar that counts pictures; in a log, which keeps every line, it comes twice a minute."""
    pause = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, unit=" pictures", smoothing=0, mininterval=pause)
