"""Lines of text for pictures: in the font that Pillow brings, or one of the machine's."""

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

DOTS = "..."
SMALL = 12  # pixels, of text in pictures that are looked at in their own size
# Fonts with Chinese letters, as Linux, Windows and macOS call their files. Pillow's has none.
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "msyh.ttc",
    "simhei.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def one_line(text: str) -> str:
    """A text as it can be drawn: in one line, ? for each letter that no font here has."""
    words = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return words if has_letters_of(words) else words.encode("latin-1", "replace").decode("latin-1")


def has_letters_of(text: str) -> bool:
    """Whether the letters of a text can be drawn on this machine."""
    return _is_latin(text) or _wide_font(SMALL) is not None


def write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], line: str, size: int = SMALL, **options
) -> None:
    """Draw a line; `place` is its upper left corner, `options` are those of Pillow's text."""
    draw.text(place, line, font=_font_of(line, size), **options)


def shortened(line: str, width: float, size: int = SMALL) -> str:
    """The longest beginning of a line that fits into `width` pixels, with dots where it is cut.

    A line of any length is measured a few times only, by halving.
    """
    # No letter is narrower than two pixels: what is beyond could not be seen in any case.
    beginning = line[: int(max(width, 0) / 2) + 1]
    if beginning == line and width_of(line, size) <= width:
        return line
    fits = 0
    too_long = len(beginning)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if width_of(beginning[:middle] + DOTS, size) <= width:
            fits = middle
        else:
            too_long = middle
    return beginning[:fits].rstrip() + DOTS


def width_of(line: str, size: int = SMALL) -> float:
    """Pixels from the left to the right end of a line."""
    return _ruler().textlength(line, font=_font_of(line, size))


def _font_of(line: str, size: int) -> Font:
    """Pillow's own font where it has the letters."""
    wide = None if _is_latin(line) else _wide_font(size)
    return wide or _own_font(size)


def _is_latin(text: str) -> bool:
    return all(ord(letter) < 256 for letter in text)


@lru_cache
def _own_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache
def _wide_font(size: int) -> Font | None:
    """A font of the machine with Chinese letters, or None; Pillow looks where they lie."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


@lru_cache
def _ruler() -> ImageDraw.ImageDraw:
    return ImageDraw.Draw(Image.new("L", (1, 1)))
