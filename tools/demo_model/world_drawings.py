"""Drawings of named things, in three styles of emoji, each as large as its frame allows.

Rendered pictures are PNG or WebP, drawn ones SVG, as Iconify packs them: one JSON file with the
inside of every picture's <svg>.
"""

import io
import json
from dataclasses import dataclass

from PIL import Image

from demo_model.world_archives import ArchiveError

SIDE = 192  # pixels of a drawing
MARGIN = 4  # pixels that stay free around it
_RENDERED = 3 * SIDE  # pixels of the longer side of an SVG, before it is cropped and reduced
_VISIBLE = 8  # of 255: alpha from which a pixel belongs to the thing


@dataclass(frozen=True)
class IconSet:
    """An Iconify package.

    Attributes:
        icons: its icons.json.
        names: name of an icon by its code points, those of presentation left out.
    """

    icons: dict
    names: dict[str, str]

    @classmethod
    def parse(cls, icons: bytes, characters: bytes) -> "IconSet":
        """From icons.json and chars.json."""
        names = {}
        for code_point, name in json.loads(characters).items():
            names[plain_code_point(code_point)] = name
        return cls(json.loads(icons), names)

    def svg(self, code_point: str) -> str:
        """One icon as an SVG document; raises KeyError where the set lacks it."""
        name = self.names[plain_code_point(code_point)]
        alias = self.icons.get("aliases", {}).get(name)
        icon = self.icons["icons"][alias["parent"] if alias else name]
        width = icon.get("width", self.icons["width"])
        height = icon.get("height", self.icons["height"])
        origin = f"{icon.get('left', 0)} {icon.get('top', 0)}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{origin} {width} {height}">'
            f"{icon['body']}</svg>"
        )


def plain_code_point(code_point: str) -> str:
    """Code points joined by "-" in lower case, without the selector of an emoji's presentation."""
    parts = code_point.lower().split("-")
    return "-".join(part for part in parts if part != "fe0f")


def rendered(svg: str) -> Image.Image:
    """An SVG as an RGBA picture; raises ArchiveError where the library for it is missing."""
    try:
        import resvg_py
    except ImportError as error:
        raise ArchiveError(
            f"Drawing SVG needs resvg_py ({error}). Run: pip install -r requirements-world.txt"
        ) from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=_RENDERED, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def fitted(picture: Image.Image) -> Image.Image:
    """(192, 192) RGBA: what is visible of a picture, scaled to the frame and centred in it.

    Raises ValueError for an RGBA picture with nothing to see.
    """
    alpha = picture.getchannel("A")
    box = alpha.point(lambda level: 255 if level >= _VISIBLE else 0).getbbox()
    if box is None:
        raise ValueError("a drawing is empty, expected something to see in it")
    thing = picture.crop(box)
    scale = (SIDE - 2 * MARGIN) / max(thing.size)
    size = [max(1, round(side * scale)) for side in thing.size]
    # Pillow resizes RGBA with premultiplied colours: what is transparent darkens no edge.
    thing = thing.resize(size, Image.Resampling.LANCZOS)
    drawing = Image.new("RGBA", (SIDE, SIDE))
    drawing.paste(thing, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return drawing
