"""Lines of text for pictures, in the one font that Pillow brings."""

from functools import lru_cache

from PIL import Image, ImageDraw

DOTS = "..."


def one_line(text: str) -> str:
    """A text as Pillow's own font can draw it: in one line, ? for each letter beyond Latin-1."""
    words = " ".join(text.split())
    return words.encode("latin-1", "replace").decode("latin-1")


def shortened(line: str, width: float) -> str:
    """The longest beginning of a line that fits into `width` pixels, with dots where it is cut.

    A line of any length is measured a few times only, by halving.
    """
    # No letter is narrower than two pixels: what is beyond could not be seen in any case.
    beginning = line[: int(max(width, 0) / 2) + 1]
    if beginning == line and width_of(line) <= width:
        return line
    fits = 0
    too_long = len(beginning)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if width_of(beginning[:middle] + DOTS) <= width:
            fits = middle
        else:
            too_long = middle
    return beginning[:fits].rstrip() + DOTS


def width_of(line: str) -> float:
    """Pixels from the left to the right end of a line."""
    return _ruler().textlength(line)


@lru_cache
def _ruler() -> ImageDraw.ImageDraw:
    return ImageDraw.Draw(Image.new("L", (1, 1)))
