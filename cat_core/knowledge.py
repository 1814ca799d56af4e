"""What a file says of the things that its model was trained on, where they are few."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass

LABELS = "labels"  # keys of a file's header; files without them were trained on anything
PICTURE_SIZE = "picture_size"
NEAREST = 3  # names that stand in for an unknown one
LARGEST_SIZE = 100_000  # pixels; a larger picture_size is none


@dataclass(frozen=True)
class Knowledge:
    """The names that a model knows, and the size of its pictures.

    Attributes:
        labels: all names of objects that it can draw; empty where they are not listed.
        picture_size: side of its training pictures in pixels; None where it is not said.
    """

    labels: tuple[str, ...] = ()
    picture_size: int | None = None

    def header(self) -> dict[str, str]:
        """What is added to a file's header. Readers that do not know these keys skip them."""
        entries = {}
        if self.labels:
            entries[LABELS] = json.dumps(self.labels, ensure_ascii=False)
        if self.picture_size:
            entries[PICTURE_SIZE] = str(self.picture_size)
        return entries

    @classmethod
    def of_header(cls, metadata: Mapping[str, str]) -> "Knowledge":
        """Read it from a header; what cannot be read is taken as not said: it only gives hints."""
        size = metadata.get(PICTURE_SIZE, "")
        is_size = size.isascii() and size.isdigit() and 0 < int(size[:9]) <= LARGEST_SIZE
        return cls(_labels(metadata.get(LABELS, "[]")), int(size) if is_size else None)

    def nearest_to(self, label: str) -> list[str]:
        """Known names spelt most like an unknown one; none where it is known, or no name is."""
        known = {_plain(name): name for name in self.labels}
        asked = _plain(label)
        if not known or asked in known:
            return []
        # What is longer than any name cannot be like one, and takes long to compare.
        asked = asked[: 2 * max(map(len, known))]
        return [known[name] for name in difflib.get_close_matches(asked, known, NEAREST, 0.0)]


def _labels(text: str) -> tuple[str, ...]:
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return ()
    return tuple(labels)


def _plain(label: str) -> str:
    """A name as CLIP's tokenizer sees it: capitals and spaces do not count."""
    return " ".join(label.lower().split())
