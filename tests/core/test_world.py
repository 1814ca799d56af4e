"""The demo model's world of things in photographs, on a small one made here."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from demo_model import world, world_judge, world_questions
from demo_model.world_sources import STYLES, is_held_out

pytestmark = pytest.mark.slow

NAMES = 10
SHAPES = ("ellipse", "rectangle")


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory):
    """As world_sources.fetch fills one: discs and squares, and photographs of noise."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    things = []
    for index in range(NAMES):
        things.append({"index": index, "english": f"thing{index}", "chinese": f"物{index}"})
        for style in STYLES:
            drawing = Image.new("RGBA", (192, 192))
            pen = ImageDraw.Draw(drawing)
            colour = tuple(rng.integers(40, 255, 3).tolist())
            getattr(pen, SHAPES[index % 2])((6, 6, 186, 186), fill=(*colour, 255))
            path = folder / f"things/{style}/{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing.save(path)
    photographs = []
    (folder / "photographs").mkdir()
    for number, size in enumerate([(700, 640), (640, 900), (300, 260)]):
        levels = rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"photographs/{number:03}.jpg")
        photographs.append({"file": f"{number:03}.jpg", "held_out": number == 2})
    (folder / "things.json").write_text(json.dumps(things), encoding="utf-8")
    (folder / "photographs.json").write_text(json.dumps(photographs), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def scenery(world_folder):
    return world.load(world_folder)


@pytest.fixture(scope="session")
def pictures(scenery):
    return world.Painter(scenery, [0, 1]).paint(24, seed=1)


def test_a_world_is_read_with_its_names_and_held_out_photographs(scenery):
    assert scenery.names[3] == ("thing3", "物3")
    assert scenery.held_out.tolist() == [False, False, True]
    assert scenery.photograph_sizes.tolist() == [[640, 700], [640, 640], [260, 300]]
    colours = scenery.drawings[..., :3, :, :].int()
    assert (colours <= scenery.drawings[..., 3:, :, :].int() + 1).all()  # premultiplied


def test_the_same_seed_paints_the_same_pictures(scenery, pictures):
    again = world.Painter(scenery, [0, 1]).paint(24, seed=1)
    other = world.Painter(scenery, [0, 1]).paint(24, seed=2)
    for field in dataclasses.fields(world.Pictures):
        assert torch.equal(getattr(again, field.name), getattr(pictures, field.name))
    assert not torch.equal(other.whole, pictures.whole)


def test_pictures_are_in_range_and_show_their_things(pictures):
    assert pictures.whole.shape == (24, 3, world.SIZE, world.SIZE)
    for part in (pictures.whole, pictures.without, pictures.shown, pictures.target):
        assert 0 <= part.min() <= part.max() <= 1
    there = pictures.things >= 0
    assert there[:, 0].all()
    assert 0 < there[:, 1:].float().mean() < 1
    assert (pictures.shown.amax((2, 3))[~there] == 0).all()
    assert (pictures.target.amax((1, 2, 3)) > 0.9).all()


def test_a_target_is_as_large_as_the_picture_says(pictures):
    size = (pictures.target[:, 0] > 0.5).any(1).sum(1) / world.SIZE
    inside = pictures.target[:, 0, :, [0, -1]].amax((1, 2)) == 0  # not cut by the sides
    # Drawings fill 180 of 192 pixels, and are turned a little.
    ratio = size[inside] / pictures.longer_side[inside]
    assert ((ratio > 0.85) & (ratio < 1.5)).all()


@pytest.mark.parametrize("kind", ["box", "blob"])
def test_a_hole_covers_the_target(pictures, kind):
    if kind == "box":
        hole = world.box_holes(pictures, np.random.default_rng(0))
    else:
        hole = world.blob_holes(pictures, seed=0)
    assert set(hole.unique().tolist()) == {0, 1}
    assert (hole[pictures.target > 0.1] == 1).all()
    assert (hole.mean((1, 2, 3)) < 0.75).all()
    if kind == "box":
        for row in hole[:, 0]:
            lines = row[row.any(1)][:, row.any(0)]
            assert (lines == 1).all()


def test_outside_the_hole_nothing_of_the_target_is_seen(pictures):
    hole = world.box_holes(pictures, np.random.default_rng(0))
    seen = world.within(pictures, hole)
    outside = (hole == 0).expand_as(seen)
    assert torch.equal(seen[outside], pictures.without[outside])
    assert torch.equal(seen[~outside], pictures.whole[~outside])


def test_random_holes_follow_the_seed():
    first = world.random_holes(8, 1, "cpu")
    assert torch.equal(first, world.random_holes(8, 1, "cpu"))
    assert not torch.equal(first, world.random_holes(8, 2, "cpu"))


@pytest.mark.parametrize("targets, expected", [("trained", False), ("held out", True)])
def test_held_out_pairs_are_painted_when_they_are_asked_for_only(scenery, targets, expected):
    painter = world.Painter(scenery, [0], targets)
    for seed in range(8):
        painted = painter.paint(16, seed)
        style = painted.style.numpy()
        assert (is_held_out(painted.things[:, 0].numpy(), style) == expected).all()
        others = painted.things[:, 1:].numpy()
        there = others >= 0
        assert not is_held_out(others, style[:, None])[there].any()


def test_no_picture_names_a_thing_twice(scenery):
    things = world.Painter(scenery, [0]).paint(64, seed=5).things
    for row in things.tolist():
        named = [thing for thing in row if thing >= 0]
        assert len(named) == len(set(named))


def test_a_gallery_shows_what_was_painted(scenery):
    gallery = world.Gallery(world.Painter(scenery, [0, 1]), count=6, seed=3, at_once=4)
    painted = world.Painter(scenery, [0, 1]).paint(4, seed=3)
    assert torch.allclose(gallery.kept["whole"][:4].float() / 255, painted.whole, atol=1 / 255)
    shown = gallery.paint(32, seed=0)
    again = gallery.paint(32, seed=0)
    assert torch.equal(shown.whole, again.whole)
    ways = set()
    for picture in shown.whole:
        for number, kept in enumerate(gallery.kept["whole"]):
            if torch.equal(picture, kept.float() / 255):
                ways.add((number, "as it is"))
            if torch.equal(picture.flip(2), kept.float() / 255):
                ways.add((number, "mirrored"))
    assert len(ways) > 3


def test_the_judge_looks_at_the_hole():
    hole = torch.zeros(1, 1, world.SIZE, world.SIZE)
    eighth = world.SIZE // 8
    hole[..., 2 * eighth : 6 * eighth, eighth : 3 * eighth] = 1
    centre, size = world_judge.of_holes(hole)
    assert centre.tolist() == [[-0.5, 0]]
    assert size.item() == 0.5
    (crop,) = world_judge.crops(hole.expand(-1, 3, -1, -1), centre, size)
    assert crop[0, :, 32].mean() > 0.7  # down its middle the hole, and a little around
    assert crop[0, 32, :8].max() < 0.1  # beside it none


@pytest.mark.parametrize("small", [False, True])
def test_the_judge_learns_and_survives_a_file(scenery, tmp_path, small):
    seen = world_judge.examples(world.Painter(scenery, [0]), 8)
    judge = world_judge.NamingJudge(NAMES, small)
    world_judge.train(judge, seen, steps=30, batch_size=16, device="cpu")
    path = tmp_path / "judge.safetensors"
    world_judge.save(judge, path)
    again = world_judge.load(path, NAMES)
    looked_at = world.Painter(scenery, [0], "any").paint(32, seed=9)
    hole = world.box_holes(looked_at, np.random.default_rng(0))
    first = world_judge.judged(judge, looked_at.whole, hole)
    second = world_judge.judged(again, looked_at.whole, hole)
    assert (first.thing == second.thing).all()
    right = (first.thing == looked_at.things[:, 0].numpy()).mean()
    assert right > 2 / NAMES


def test_questions_are_kept_for_later(scenery, tmp_path):
    asked = world_questions.questions(scenery, 3, "box")
    world_questions.keep(asked, scenery.names, tmp_path)
    kept, names = world_questions.kept(tmp_path)
    assert names == list(scenery.names)
    for before, after in zip(asked, kept, strict=True):
        assert torch.equal(before.hole, after.hole)
        assert (before.thing, before.style, before.alone) == (after.thing, after.style, after.alone)
        assert (before.whole - after.whole).abs().mean() < 0.05  # JPEG, of noise
        outside = before.hole < 0.5
        assert torch.equal(before.whole[outside], before.photograph[outside])
