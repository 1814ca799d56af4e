"""The lists of the demo model's world, and how its packages are read; no network is needed."""

import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from demo_model import world_archives, world_drawings, world_sources
from demo_model.qt_resource import ResourceError, open_resource
from demo_model.world_archives import Archive, ArchiveError

THINGS = world_sources.listed_things()
PHOTOGRAPHS = world_sources.listed_photographs()
STYLES = len(world_sources.STYLES)


# Things -------------------------------------------------------------------------------------------


def test_there_are_three_hundred_things_or_more():
    assert len(THINGS) >= 300


@pytest.mark.parametrize("field", ["english", "chinese", "code_point"])
def test_no_two_things_share_a_name(field):
    names = [getattr(thing, field) for thing in THINGS]
    assert len(set(names)) == len(names)


def test_names_are_written_as_one_says_them():
    for thing in THINGS:
        assert thing.english == thing.english.lower().strip()
        assert thing.english.isascii()
        assert len(thing.english.split()) <= 3
        assert thing.chinese == thing.chinese.strip()
        assert not thing.chinese.isascii()


def test_each_thing_is_trained_in_two_styles_at_least():
    thing, style = np.mgrid[: len(THINGS), :STYLES]
    held_out = world_sources.is_held_out(thing, style)
    assert held_out.sum(axis=1).max() == 1
    assert held_out.mean() == pytest.approx(0.2, abs=0.005)


def test_held_out_pairs_are_of_all_styles():
    thing, style = np.mgrid[: len(THINGS), :STYLES]
    held_out = world_sources.is_held_out(thing, style)
    assert held_out.mean(axis=0) == pytest.approx(0.2, abs=0.005)


# Photographs --------------------------------------------------------------------------------------


def test_each_photograph_may_be_used_and_has_an_author():
    for photograph in PHOTOGRAPHS:
        assert photograph.licence in world_sources.LICENCES
        assert photograph.author.strip()
        assert photograph.title.strip()


def test_no_photograph_is_listed_twice():
    digests = {photograph.sha256 for photograph in PHOTOGRAPHS}
    assert len(digests) == len(PHOTOGRAPHS) >= 80


def test_the_package_of_each_photograph_is_known():
    for photograph in PHOTOGRAPHS:
        assert world_archives.archive_of(photograph.package).name == photograph.package


def test_nobody_took_photographs_of_both_sorts():
    held_out = {photograph.author for photograph in PHOTOGRAPHS if photograph.held_out}
    trained = {photograph.author for photograph in PHOTOGRAPHS if not photograph.held_out}
    assert held_out & trained == set()


def test_about_a_seventh_of_the_photographs_is_held_out():
    held_out = [photograph.held_out for photograph in PHOTOGRAPHS]
    assert 0.12 < np.mean(held_out) < 0.18


def test_the_credits_name_all_photographs():
    text = world_sources.credits_table(PHOTOGRAPHS)
    for photograph in PHOTOGRAPHS:
        assert f"| {photograph.title} | {photograph.author} | {photograph.licence} |" in text


# Pictures -----------------------------------------------------------------------------------------


def saved(picture: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue()


def test_a_drawing_fills_its_frame_but_for_the_margin():
    picture = Image.new("RGBA", (256, 256))
    picture.paste((200, 30, 30, 255), (10, 100, 70, 130))
    drawing = world_drawings.fitted(picture)
    assert drawing.size == (192, 192)
    assert drawing.getbbox() == (4, 50, 188, 142)


def test_a_drawing_has_no_dark_edge():
    white_on_black = np.zeros((256, 256, 4), np.uint8)
    y, x = np.mgrid[:256, :256]
    white_on_black[np.hypot(y - 128, x - 128) < 101.5] = 255
    drawing = np.asarray(world_drawings.fitted(Image.fromarray(white_on_black)))
    edge = drawing[(drawing[..., 3] > 16) & (drawing[..., 3] < 240)]
    assert len(edge) > 100
    assert edge[:, :3].min() >= 250


def test_an_empty_drawing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        world_drawings.fitted(Image.new("RGBA", (8, 8)))


def test_an_icon_is_found_by_its_code_points_and_by_its_alias():
    icons = {
        "width": 32,
        "height": 32,
        "icons": {
            "key": {"body": "<path d='M1'/>"},
            "tall": {"body": "<g/>", "height": 40, "top": -4},
        },
        "aliases": {"old": {"parent": "key"}},
    }
    characters = {"1f5dd": "tall", "1f511-fe0f": "old"}
    files = [json.dumps(content).encode() for content in (icons, characters)]
    icon_set = world_drawings.IconSet.parse(*files)
    assert 'viewBox="0 -4 32 40"><g/></svg>' in icon_set.svg("1f5dd-fe0f")
    assert "<path d='M1'/></svg>" in icon_set.svg("1f511")


def test_an_svg_is_rendered_with_its_transparency():
    pytest.importorskip("resvg_py", reason="resvg_py is not installed (requirements-world.txt)")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8" viewBox="0 0 8 8">'
    svg += '<rect width="4" height="8" fill="#0000ff"/></svg>'
    picture = world_drawings.rendered(svg)
    assert picture.size == (576, 576)
    assert picture.getpixel((100, 300)) == (0, 0, 255, 255)
    assert picture.getpixel((500, 300))[3] == 0


def test_a_photograph_is_reduced_to_its_shorter_side_and_never_enlarged():
    wide = saved(Image.new("RGB", (3000, 1280)), "jpeg")
    assert world_sources.reduced(wide).size == (1500, 640)
    small = saved(Image.new("RGB", (300, 200)), "png")
    assert world_sources.reduced(small).size == (300, 200)


# Packages -----------------------------------------------------------------------------------------


def tar_bytes(mode: str, **files: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


@pytest.fixture
def packages(tmp_path):
    """An npm package, a wheel and a Debian package, each with the files usr/a and usr/b."""
    files = {"a": b"first", "b": b"second"}
    npm = tmp_path / "package.tgz"
    npm.write_bytes(tar_bytes("w:gz", **files))
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in files.items():
            file.writestr(f"usr/{name}", content)
    debian = tmp_path / "package.deb"
    data = lzma.compress(tar_bytes("w", **files))
    members = (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data))
    debian.write_bytes(b"!<arch>\n" + b"".join(ar_member(*member) for member in members))
    return npm, wheel, debian


def test_files_are_read_out_of_every_kind_of_package(packages):
    for path in packages:
        assert world_archives.read_files(path, ["usr/b"]) == {"usr/b": b"second"}


def test_a_file_that_a_package_lacks_is_named(packages):
    for path in packages:
        with pytest.raises(ArchiveError, match="has no usr/c"):
            world_archives.read_files(path, ["usr/a", "usr/c"])


def test_a_package_with_another_hash_is_refused(tmp_path):
    archive = Archive("npm", "somebody", "1.0.0", "somebody-1.0.0.tgz", "0" * 64)
    (tmp_path / archive.file).write_bytes(b"something else")
    with pytest.raises(ArchiveError, match=r"has sha256 [0-9a-f]{64}, expected 0{64}. Delete it"):
        world_archives.fetch_archive(archive, tmp_path)


@pytest.mark.parametrize(
    ("package", "program", "remedy"),
    [
        ("@iconify-json/noto", "npm", "Install Node.js"),
        ("palapeli-data", "apt-get", "Run this on Debian 12"),
    ],
)
def test_a_missing_program_is_named(package, program, remedy, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    archive = world_archives.archive_of(package)
    with pytest.raises(ArchiveError, match=rf"{program} is not installed. {remedy}") as error:
        world_archives.fetch_archive(archive, tmp_path / "archives")
    assert f"put {archive.file} into {tmp_path / 'archives'} yourself" in str(error.value)
    assert list((tmp_path / "archives").iterdir()) == []


# Qt resources -------------------------------------------------------------------------------------


def resource_bytes(version: int = 2) -> bytes:
    """A resource with the folder "in" and its files "a", as it is, and "b", compressed."""
    names = b""
    places = []
    for name in ("in", "a", "b"):
        places.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    contents = b""
    starts = []
    for content in (b"first", struct.pack(">I", 6) + zlib.compress(b"second")):
        starts.append(len(contents))
        contents += struct.pack(">I", len(content)) + content
    date = b"" if version == 1 else bytes(8)
    tree = struct.pack(">IHII", 0, 2, 1, 1) + date
    tree += struct.pack(">IHII", places[0], 2, 2, 2) + date
    tree += struct.pack(">IHHHI", places[1], 0, 0, 1, starts[0]) + date
    tree += struct.pack(">IHHHI", places[2], 1, 0, 1, starts[1]) + date
    begin = 20
    header = (begin, begin + len(tree), begin + len(tree) + len(contents))
    return b"qres" + struct.pack(">4I", version, *header) + tree + contents + names


@pytest.mark.parametrize("version", [1, 2])
def test_the_files_of_a_resource_are_found_by_their_paths(version):
    files = open_resource(resource_bytes(version))
    assert sorted(files) == ["in/a", "in/b"]
    assert files["in/a"]() == b"first"
    assert files["in/b"]() == b"second"


def test_what_is_no_resource_is_refused():
    with pytest.raises(ResourceError, match="begins with b'qres', found b'PK"):
        open_resource(b"PK\x03\x04 and so on")
    with pytest.raises(ResourceError, match="version 9"):
        open_resource(b"qres" + struct.pack(">4I", 9, 0, 0, 0))
