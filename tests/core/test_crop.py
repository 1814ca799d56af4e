"""The square around a hole, and the way back: which pixels are exact, and what the others are."""

import pytest
import torch

from cat_diffusion.cat_core.pictures import crop
from cat_diffusion.cat_core.pictures.crop import Box, Square

HEIGHT, WIDTH = 150, 203  # of most photos here: no multiples of 8


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def holes(*boxes, height=HEIGHT, width=WIDTH):
    """(1, 1, H, W) with white boxes: (left, top, right, bottom)."""
    mask = torch.zeros(1, 1, height, width)
    for left, top, right, bottom in boxes:
        mask[..., top:bottom, left:right] = 1
    return mask


def pixels(picture, square):
    """The square of (B, C, H, W), which must lie inside."""
    end_row = square.top + square.side
    end_column = square.left + square.side
    assert min(square.left, square.top) >= 0
    assert end_row <= picture.shape[2]
    assert end_column <= picture.shape[3]
    return picture[:, :, square.top : end_row, square.left : end_column]


# Which square ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box, size, context, expected",
    [
        (Box(100, 70, 120, 80), 64, 1.5, Square(78, 43, 64)),  # no smaller than the size
        (Box(100, 70, 140, 80), 64, 2.0, Square(80, 35, 80)),  # twice the longer side
        (Box(100, 40, 110, 90), 64, 1.5, Square(67, 27, 75)),
        (Box(0, 0, 20, 20), 64, 1.5, Square(0, 0, 64)),  # clamped at each border
        (Box(190, 140, 203, 150), 64, 1.5, Square(139, 86, 64)),
        (Box(0, 60, 50, 70), 64, 2.0, Square(0, 15, 100)),
        (Box(50, 60, 150, 70), 64, 8.0, Square(25, 0, 150)),  # the largest square that fits
        (Box(50, 60, 60, 70), 512, 1.5, Square(0, 0, 150)),
        (Box(20, 60, 190, 70), 64, 1.5, Square(20, -20, 170)),  # longer than the photo is high
        (Box(0, 0, 203, 150), 64, 1.5, Square(0, -27, 203)),  # the whole photo
        (Box(0, 0, 203, 1), 64, 1.0, Square(0, -53, 203)),  # beyond the photo, but no farther
    ],
)
def test_the_square(box, size, context, expected):
    assert crop.square_around(box, size, context, HEIGHT, WIDTH) == expected


@pytest.mark.parametrize("height, width", [(1, 1), (5, 90), (90, 5), (64, 64), (65, 71)])
@pytest.mark.parametrize("size", [8, 64, 512])
def test_a_square_holds_its_box_and_reaches_beyond_narrow_photos_only(height, width, size):
    generator = torch.Generator().manual_seed(height + width)
    for _ in range(50):
        left, right = sorted(torch.randint(width + 1, (2,), generator=generator).tolist())
        top, bottom = sorted(torch.randint(height + 1, (2,), generator=generator).tolist())
        box = Box(min(left, width - 1), min(top, height - 1), max(right, 1), max(bottom, 1))
        square = crop.square_around(box, size, 1.5, height, width)
        assert square.left <= box.left
        assert square.top <= box.top
        assert square.left + square.side >= box.right
        assert square.top + square.side >= box.bottom
        for start, length in ((square.left, width), (square.top, height)):
            if square.side <= length:
                assert 0 <= start <= length - square.side
            else:
                assert length - square.side <= start <= 0
                assert square.side == box.longer_side


def test_all_islands_share_one_box():
    mask = holes((30, 20, 33, 22), (100, 90, 110, 120), (60, 50, 61, 51))
    assert crop.mask_box(mask[0, 0]) == Box(30, 20, 110, 120)


def test_a_box_counts_all_that_would_be_repainted_but_no_black_that_the_host_misread():
    mask = torch.full((50, 60), 1 - 254.008 / 255)
    assert crop.mask_box(mask) is None
    mask[7, 9] = 2 / 255
    assert crop.mask_box(mask) == Box(9, 7, 10, 8)


def test_an_empty_mask_takes_the_middle():
    chosen = crop.crop_around_mask(noise(1, 3, HEIGHT, WIDTH), holes(), 64, 1.5)
    assert chosen.squares == (Square(69, 43, 64),)


# What the model gets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hole",
    [(100, 70, 120, 80), (0, 0, 9, 9), (199, 0, 203, 4), (0, 149, 1, 150), (190, 140, 203, 150)],
)
def test_a_small_hole_keeps_the_pixels_of_the_photo(hole):
    photo = noise(1, 3, HEIGHT, WIDTH)
    mask = holes(hole) * noise(1, 1, HEIGHT, WIDTH, seed=1)  # soft
    chosen = crop.crop_around_mask(photo, mask, 64, 1.5)
    image_64, mask_64 = chosen.sized(64)
    assert torch.equal(image_64, pixels(photo, chosen.squares[0]))
    assert torch.equal(mask_64, pixels(mask, chosen.squares[0]))
    assert mask_64.sum() == pytest.approx(mask.sum().item())


def test_a_large_hole_is_scaled_down():
    ramp = torch.linspace(0, 1, WIDTH).expand(1, 3, HEIGHT, WIDTH)
    chosen = crop.crop_around_mask(ramp, holes((40, 20, 140, 100)), 64, 1.28)
    (square,) = chosen.squares
    assert square == Square(26, 0, 128)
    image_64, mask_64 = chosen.sized(64)
    # Two pixels become one: a ramp has their mean, but for the filter's reach at the border.
    means = pixels(ramp, square).unflatten(3, (64, 2)).mean(4)[:, :, ::2]
    assert torch.allclose(image_64[..., 2:-2], means[..., 2:-2], atol=1e-5)
    assert mask_64.sum() == 50 * 40
    assert mask_64[..., 10:50, 7:57].all()


def test_a_tiny_photo_is_scaled_up():
    photo = noise(1, 3, 20, 31)
    chosen = crop.crop_around_mask(photo, holes((3, 4, 6, 9), height=20, width=31), 64, 1.5)
    image_64, mask_64 = chosen.sized(64)
    assert chosen.squares == (Square(0, 0, 20),)
    assert image_64.shape == (1, 3, 64, 64)
    assert 0 <= image_64.min() < image_64.max() <= 1
    # Halfway from a pixel to the next the bicubic filter is near their mean.
    assert image_64.mean() == pytest.approx(photo[0, :, :, :20].mean().item(), abs=5e-3)
    assert mask_64.unique().tolist() == [0, 1]


def test_beyond_a_narrow_photo_its_edge_is_repeated():
    photo = noise(1, 3, 20, 90)
    mask = holes((5, 15, 69, 20), height=20, width=90)
    chosen = crop.crop_around_mask(photo, mask, 64, 1.5)
    assert chosen.squares == (Square(5, -15, 64),)
    image_64, mask_64 = chosen.sized(64)
    assert torch.equal(image_64[:, :, 15:35], photo[:, :, :, 5:69])
    assert (image_64[:, :, :15] == photo[:, :, :1, 5:69]).all()
    assert (image_64[:, :, 35:] == photo[:, :, -1:, 5:69]).all()
    # What is hidden stays hidden where it is repeated.
    assert mask_64[:, :, 30:].all()
    assert not mask_64[:, :, :30].any()


def test_every_photo_has_its_own_square():
    photo = noise(2, 3, HEIGHT, WIDTH)
    mask = torch.cat((holes((0, 0, 9, 9)), holes((20, 10, 150, 140))))
    chosen = crop.crop_around_mask(photo, mask, 64, 1.0)
    assert [square.side for square in chosen.squares] == [64, 130]
    image_64, mask_64 = chosen.sized(64)
    assert image_64.shape == (2, 3, 64, 64)
    assert mask_64.shape == (2, 1, 64, 64)
    assert torch.equal(image_64[:1], photo[:1, :, :64, :64])
    alone = crop.crop_around_mask(photo[1:], mask[1:], 64, 1.0)
    assert torch.equal(image_64[1:], alone.sized(64)[0])


# The mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(64, 64), (150, 203), (37, 11), (7, 1), (151, 204)])
def test_a_scaled_mask_covers_all_that_it_touched(height, width):
    mask = noise(3, 1, 37, 11) * (noise(3, 1, 37, 11, seed=1) > 0.9)
    # On a grid that both sizes share each of their pixels is a block.
    fine = mask.repeat_interleave(height, 2).repeat_interleave(width, 3)
    expected = fine.unflatten(3, (width, 11)).amax(4).unflatten(2, (height, 37)).amax(3)
    assert torch.equal(crop.scale_mask(mask, height, width), expected)


@pytest.mark.parametrize("size", [64, 128, 200])
def test_a_mask_of_two_values_keeps_them_and_a_soft_one_stays_soft(size):
    hard = holes((40, 20, 140, 100))
    soft = hard * noise(1, 1, HEIGHT, WIDTH)
    photo = noise(1, 3, HEIGHT, WIDTH)
    for mask, values in ((hard, 2), (soft, 1000)):
        _, sized = crop.crop_around_mask(photo, mask, size, 1.5).sized(size)
        assert len(sized.unique()) >= values
        assert torch.isin(sized, mask).all()


def test_a_mask_of_another_size_is_scaled_to_the_photo():
    mask = holes((0, 0, 1, 1), height=30, width=29)  # 5 times lower, 7 times narrower
    chosen = crop.crop_around_mask(noise(1, 3, HEIGHT, WIDTH), mask, 64, 1.5)
    assert torch.equal(chosen.mask, holes((0, 0, 7, 5)))


# Back into the photo --------------------------------------------------------------------------


@pytest.fixture
def cropped():
    """Choose the squares for size 64; returns (crop, as many pictures of noise)."""

    def cropped(mask, photo=None, context=1.5, copies=1):
        if photo is None:
            photo = noise(len(mask), 3, *mask.shape[2:])
        chosen = crop.crop_around_mask(photo, mask, 64, context)
        return chosen, noise(copies * len(mask), 3, 64, 64, seed=2)

    return cropped


BOXES = [(100, 70, 120, 80), (0, 0, 9, 9), (199, 0, 203, 4), (190, 140, 203, 150), (5, 5, 60, 60)]


@pytest.mark.parametrize("hole", BOXES)
def test_without_a_soft_edge_both_sides_are_exact(cropped, hole):
    mask = holes(hole, (hole[0], hole[1], hole[0] + 1, hole[1] + 40))  # not a rectangle
    chosen, drawn = cropped(mask, context=1.0)
    (square,) = chosen.squares
    assert square.side == 64
    stitched = crop.stitch(chosen, drawn, 0)
    masked = mask.expand_as(stitched) == 1
    assert torch.equal(stitched[~masked], chosen.photo[~masked])
    placed = torch.full_like(stitched, torch.nan)
    pixels(placed, square).copy_(drawn)
    assert torch.equal(stitched[masked], placed[masked])


def test_putting_back_what_was_cut_out_changes_nothing(cropped):
    chosen, _ = cropped(holes((90, 60, 120, 90)) * 0.7)
    image_64, _ = chosen.sized(64)
    stitched = crop.stitch(chosen, image_64, 8)
    assert torch.allclose(stitched, chosen.photo, atol=1e-6)


def test_a_soft_mask_mixes(cropped):
    mask = holes((100, 70, 120, 80)) * noise(1, 1, HEIGHT, WIDTH, seed=3)
    chosen, drawn = cropped(mask)
    (square,) = chosen.squares
    window = pixels(crop.stitch(chosen, drawn, 0), square)
    share = pixels(mask, square)
    expected = pixels(chosen.photo, square) * (1 - share) + drawn * share
    assert torch.allclose(window, expected, atol=1e-6)


def distances(*boxes):
    """(H, W) Euclidean distance of each pixel to the nearest one of the boxes."""
    row = torch.arange(HEIGHT).view(-1, 1)
    column = torch.arange(WIDTH).view(1, -1)
    nearest = torch.full((HEIGHT, WIDTH), torch.inf)
    for left, top, right, bottom in boxes:
        down = torch.maximum(top - row, row - bottom + 1).clamp(min=0)
        across = torch.maximum(left - column, column - right + 1).clamp(min=0)
        nearest = torch.minimum(nearest, (down**2 + across**2).sqrt())
    return nearest


@pytest.mark.parametrize("soft_edge", [1, 8, 20])
def test_a_soft_edge_fades_outwards_and_ends_where_it_says(cropped, soft_edge):
    boxes = [(100, 70, 120, 80), (104, 60, 106, 90)]
    chosen, _ = cropped(holes(*boxes), torch.zeros(1, 3, HEIGHT, WIDTH), context=3.0)
    share = crop.stitch(chosen, torch.ones(1, 3, 90, 90), soft_edge)[0, 0]
    distance = distances(*boxes)
    expected = 1 - distance / (soft_edge + 1)
    expected[distance > soft_edge] = 0
    assert torch.allclose(share, expected, atol=1e-5)
    assert torch.equal(share == 1, distance == 0)
    assert torch.equal(share == 0, distance > soft_edge)


@pytest.mark.parametrize("soft_edge", [0, 1, 8, 40, 256])
@pytest.mark.parametrize("hole", [*BOXES, (20, 10, 150, 140), (10, 60, 190, 70)])
def test_the_photo_is_exact_beyond_the_soft_edge(cropped, hole, soft_edge):
    chosen, drawn = cropped(holes(hole))
    stitched = crop.stitch(chosen, drawn, soft_edge)
    beyond = (distances(hole) > soft_edge).expand_as(stitched)
    assert torch.equal(stitched[beyond], chosen.photo[beyond])
    assert not torch.equal(stitched, chosen.photo)


def test_a_soft_edge_leaves_no_seam_where_the_square_ends(cropped):
    mask = holes((70, 40, 130, 100))  # two pixels of the square are left around it
    chosen, _ = cropped(mask, torch.zeros(1, 3, HEIGHT, WIDTH), context=1.0)
    share = crop.stitch(chosen, torch.ones(1, 3, 64, 64), 100)[0, 0]
    assert chosen.squares == (Square(68, 38, 64),)
    along = torch.tensor([0, 1 / 3, 2 / 3, 1])
    assert torch.allclose(share[70, 67:71], along)
    assert torch.allclose(share[70, 129:133], along.flip(0))
    assert torch.allclose(share[37:41, 100], along)


def test_a_soft_edge_reaches_the_edge_of_the_photo(cropped):
    mask = holes((2, 2, 20, 20))
    chosen, _ = cropped(mask, torch.zeros(1, 3, HEIGHT, WIDTH))
    share = crop.stitch(chosen, torch.ones(1, 3, 64, 64), 9)[0, 0]
    assert torch.allclose(share[10, :4], torch.tensor([0.8, 0.9, 1, 1]))


def test_a_mask_softer_than_the_soft_edge_keeps_its_own(cropped):
    mask = holes((100, 70, 120, 80))
    mask[..., 75, 60:100] = torch.linspace(0, 1, 42)[1:-1]
    chosen, _ = cropped(mask, torch.zeros(1, 3, HEIGHT, WIDTH))
    share = crop.stitch(chosen, torch.ones(1, 3, 64, 64), 4)[0, 0]
    assert torch.equal(share[75, 60:98], mask[0, 0, 75, 60:98])
    grey = mask * 0.7
    chosen, _ = cropped(grey, torch.zeros(1, 3, HEIGHT, WIDTH))
    share = crop.stitch(chosen, torch.ones(1, 3, 64, 64), 4)[0, 0]
    assert torch.allclose(share, grey[0, 0])


def test_a_square_that_was_scaled_goes_back_in_its_own_size(cropped):
    ramp = torch.linspace(0, 1, WIDTH).expand(1, 3, HEIGHT, WIDTH)
    mask = holes((40, 20, 140, 100))
    chosen, _ = cropped(mask, ramp, context=1.28)
    image_64, _ = chosen.sized(64)
    stitched = crop.stitch(chosen, image_64, 0)
    assert torch.allclose(stitched, ramp, atol=1e-4)
    assert not torch.equal(stitched, ramp)
    outside = mask.expand_as(ramp) == 0
    assert torch.equal(stitched[outside], ramp[outside])


@pytest.mark.parametrize("side", [48, 64, 256])
def test_a_result_of_another_size_is_scaled(cropped, side):
    chosen, _ = cropped(holes((100, 70, 120, 80)))
    flat = torch.full((1, 3, side, side), 0.25)
    stitched = crop.stitch(chosen, flat, 0)
    assert torch.allclose(stitched[..., 70:80, 100:120], torch.tensor(0.25))


def test_what_lies_beyond_a_narrow_photo_is_left_out(cropped):
    mask = holes((5, 15, 69, 20), height=20, width=90)
    chosen, drawn = cropped(mask)
    stitched = crop.stitch(chosen, drawn, 0)
    assert torch.equal(stitched[:, :, 15:, 5:69], drawn[:, :, 30:35])
    assert torch.equal(stitched[:, :, :15], chosen.photo[:, :, :15])


def test_several_results_for_each_photo(cropped):
    mask = torch.cat((holes((0, 0, 9, 9)), holes((100, 70, 120, 80))))
    chosen, drawn = cropped(mask, copies=3)
    stitched = crop.stitch(chosen, drawn, 8)
    assert stitched.shape == (6, 3, HEIGHT, WIDTH)
    for first in (0, 2, 4):
        pair = crop.stitch(chosen, drawn[first : first + 2], 8)
        assert torch.equal(stitched[first : first + 2], pair)


def test_an_empty_mask_changes_nothing_and_the_crop_is_left_alone(cropped):
    chosen, drawn = cropped(holes())
    assert torch.equal(crop.stitch(chosen, drawn, 8), chosen.photo)
    chosen, drawn = cropped(holes((0, 0, 9, 9)))
    before = chosen.photo.clone()
    first = crop.stitch(chosen, drawn, 8)
    assert torch.equal(chosen.photo, before)
    assert torch.equal(crop.stitch(chosen, drawn, 8), first)
