"""Training pictures as the official training cuts them, at random and the same on every machine."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from cat_diffusion.cat_core.data.crops import Chance, cropped
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.training import identity
from cat_diffusion.cat_core.training.batches import Batches, Stream
from cat_diffusion.cat_core.training.encoding import Preparation
from cat_diffusion.cat_core.training.shards import ShardedSamples
from cat_diffusion.cat_core.training.stores import FreshSamples, chance_of

CPU = torch.device("cpu")
WHOLE = Record("a", "a.png", mask="a_mask.png", label="cup", caption="a cup of tea")
ALMOST_ONE = 1 - 2**-48


def chance(top=0.0, left=0.0, flip=0.9, caption=0.9):
    return Chance(top, left, flip, caption)


def picture_and_mask(size=(1024, 512), box=(600, 100, 700, 300)):
    """A picture whose levels tell each pixel's place, and a mask of a box."""
    width, height = size
    x = np.broadcast_to(np.arange(width) % 251, (height, width))
    y = np.broadcast_to(np.arange(height)[:, None] % 241, (height, width))
    picture = Image.fromarray(np.stack([x, y, x // 2], axis=2).astype(np.uint8))
    mask = Image.new("L", size)
    mask.paste(255, box)
    return picture, mask


@pytest.mark.parametrize(
    "box, first, last",
    [
        ((600, 100, 700, 300), 187, 512),  # as far left as its end allows, as right as the picture
        ((10, 0, 60, 50), 0, 10),
        ((100, 0, 900, 512), 100, 100),  # wider than the square: from its beginning
    ],
)
def test_squares_lie_around_the_object_as_the_official_ones(box, first, last):
    picture, mask = picture_and_mask(box=box)
    for draw, start in ((0.0, first), (ALMOST_ONE, last)):
        cut, hole = cropped(WHOLE, picture, mask, "segment", chance(left=draw))
        expected = np.asarray(picture)[:, start : start + 512]
        assert np.array_equal(cut, expected)
        dilated = np.asarray(mask.filter(ImageFilter.MaxFilter(5)))
        assert np.array_equal(hole, dilated[:, start : start + 512])


def test_the_short_side_is_512_and_nothing_is_squashed():
    picture, mask = picture_and_mask((300, 450), (100, 200, 200, 300))
    cut, hole = cropped(WHOLE, picture, mask, "box", chance(top=0.5))
    assert cut.size == hole.size == (512, 512)
    resized = picture.resize((512, 768), Image.Resampling.BILINEAR)
    rows = [np.asarray(resized)[top : top + 512] for top in range(257)]
    assert any(np.array_equal(cut, row) for row in rows)


def test_both_variants_show_the_same_part_and_boxes_are_the_records_own():
    picture, mask = picture_and_mask()
    segment, _ = cropped(WHOLE, picture, mask, "segment", chance(0.3, 0.7))
    boxed, hole = cropped(WHOLE, picture, mask, "box", chance(0.3, 0.7))
    assert np.array_equal(segment, boxed)
    assert np.count_nonzero(hole) == 100 * 200  # the mask's
    own = Record("a", "a.png", mask="a_mask.png", label="cup", box=(0.5, 0.25, 0.75, 0.5))
    _, hole = cropped(own, picture, mask, "box", chance(0.3, ALMOST_ONE))
    assert np.count_nonzero(hole) == 256 * 128


def test_half_of_the_pictures_are_mirrored_with_their_holes():
    picture, mask = picture_and_mask()
    plain, hole = cropped(WHOLE, picture, mask, "segment", chance(flip=0.4))
    mirrored, mirrored_hole = cropped(WHOLE, picture, mask, "segment", chance(flip=0.4), flip=True)
    assert np.array_equal(np.asarray(plain)[:, ::-1], mirrored)
    assert np.array_equal(np.asarray(hole)[:, ::-1], mirrored_hole)
    unturned, _ = cropped(WHOLE, picture, mask, "segment", chance(flip=0.6), flip=True)
    assert np.array_equal(plain, unturned)


def test_pictures_without_a_hole_and_with_too_small_a_one():
    picture, _ = picture_and_mask()
    free = Record("b", "b.png", caption="a table")
    places = set()
    for left in (0.0, 0.5, ALMOST_ONE):
        cut, hole = cropped(free, picture, None, "box", chance(left=left))
        assert not np.any(hole)
        places.add(np.asarray(cut).tobytes())
    assert len(places) == 3
    huge, dot = picture_and_mask((4096, 4096), (5, 5, 6, 6))
    with pytest.raises(SampleError, match="empty mask"):
        cropped(WHOLE, huge, dot, "segment", chance())


# In batches ---------------------------------------------------------------------------------------


class ReadingEncoders:
    """Frozen networks that tell apart what was cut and read."""

    def image(self, pixels):
        means = pixels.float().mean((1, 2, 3))
        return means.view(-1, 1, 1).expand(-1, 4, 2), means.view(-1, 1)

    def text(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])


@pytest.fixture
def make_store(tmp_path):
    picture, mask = picture_and_mask()
    picture.save(tmp_path / "a.png")
    mask.save(tmp_path / "a_mask.png")

    def make_store(**changes):
        how = {"objective": "distillation", "pictures": "crop", "flip": True} | changes
        return FreshSamples([WHOLE], tmp_path, ReadingEncoders(), **how)

    return make_store


def requests(steps):
    return [(step, range(2)) for step in range(steps)]


def test_each_epoch_cuts_anew_and_the_same_again_with_workers(make_store):
    once = list(Stream(Batches(make_store(), 2, 0), requests(3), CPU))
    again = list(Stream(Batches(make_store(), 2, 0, workers=2), requests(3), CPU))
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one["teacher_image"], other["teacher_image"])
    values = torch.cat([batch["teacher_image"] for batch in once]).flatten().tolist()
    assert len(set(values)) == 6
    other_seed = Batches(make_store(), 2, 1)(0, range(2))
    assert not torch.equal(other_seed["teacher_image"], once[0]["teacher_image"])


def test_a_cache_holds_one_place_a_record_and_knows_how_it_was_cut(make_store, tmp_path):
    store = ShardedSamples(tmp_path / "cache", make_store(), {})
    store.fill()
    values = [Batches(store, 2, 0)(*request)["teacher_image"] for request in requests(2)]
    assert len(set(torch.cat(values).flatten().tolist())) == 1
    with pytest.raises(Exception, match=r"flip was True, is False"):
        ShardedSamples(tmp_path / "cache", make_store(flip=False), {})
    with pytest.raises(Exception, match=r"preprocessing was 2, is 1"):
        ShardedSamples(tmp_path / "cache", make_store(pictures="squash", flip=False), {})


@pytest.mark.parametrize("share, lengths", [(None, {3}), (0.0, {3}), (1.0, {12}), (0.5, {3, 12})])
def test_captions_take_the_labels_place_in_their_share(make_store, share, lengths):
    batch = Batches(make_store(caption_share=share), 16, 0)(0, range(16))
    assert set(batch["text"].flatten().tolist()) == lengths


def test_chances_are_spread_evenly():
    drawn = torch.tensor([chance_of(f"{seed} sample 7") for seed in range(400)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert (drawn.mean(0) - 0.5).abs().max() < 0.1


def test_what_older_runs_did_is_left_unsaid():
    assert identity.of_preparation(Preparation()) == {}
    facts = identity.of_preparation(Preparation(pictures="crop", caption_share=0.2))
    assert facts == {"preprocessing": 2, "pictures": "crop", "flip": False, "caption_share": 0.2}
