"""Numbers against other ways to compute them."""

import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from cat_diffusion.cat_core.evaluation import metrics
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing
from cat_diffusion.cat_core.features import masked_cosine


def features(count, width, seed, shift=0.0):
    """Correlated features with a large mean, as networks make them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(count, width, generator=generator) @ mix * (1 + shift) + 5 + shift


def reference(real, made):
    """FID as Heusel et al. compute it, in float64."""
    real = real.double().numpy()
    made = made.double().numpy()
    real_covariance = np.cov(real, rowvar=False)
    made_covariance = np.cov(made, rowvar=False)
    root = scipy.linalg.sqrtm(real_covariance @ made_covariance).real
    means = np.square(real.mean(0) - made.mean(0)).sum()
    return means + np.trace(real_covariance + made_covariance - 2 * root)


# FID ----------------------------------------------------------------------------------------------


# The last has singular covariances.
@pytest.mark.parametrize("count, width", [(300, 48), (2000, 64), (30, 48)])
@pytest.mark.parametrize("shift", [0.02, 0.5])
def test_fid_equals_the_matrix_square_root(count, width, shift):
    real = features(count, width, 1)
    made = features(count + 7, width, 2, shift)
    found = metrics.frechet_distance(real.split(64), made.split(50))
    assert found == pytest.approx(reference(real, made), rel=1e-3)


def test_fid_does_not_depend_on_batches():
    real = features(100, 16, 1)
    made = features(90, 16, 2, 0.3)
    expected = metrics.frechet_distance([real], [made])
    found = metrics.frechet_distance(real.split(7), made.split(1))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count, width", [(300, 48), (30, 48), (8, 96)])
def test_fid_of_a_set_with_itself_is_nothing_and_never_less(count, width):
    for seed in range(8):
        real = features(count, width, seed)
        assert 0 <= metrics.frechet_distance([real], real.split(16)) < 1e-4 * real.var(0).sum()


def test_fid_needs_two_pictures_and_torchmetrics(monkeypatch):
    real = features(9, 4, 1)
    with pytest.raises(
        EvaluationError, match=r"at least 2 .* found 9 real and 1 made. Evaluate more"
    ):
        metrics.frechet_distance([real], [real[:1]])
    with pytest.raises(EvaluationError, match=r"found 0 real and 9 made"):
        metrics.frechet_distance([], [real])
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(Missing, match=r"needs torchmetrics .*requirements-evaluate.txt"):
        metrics.frechet_distance([real], [real])


# One picture --------------------------------------------------------------------------------------


def test_clip_score_has_no_negative_numbers():
    image = torch.tensor([[3.0, 4], [1, 0], [1, 0]])
    text = torch.tensor([[5.0, 0], [-1, 0], [0, 2]])
    assert metrics.clip_score(image, text).tolist() == pytest.approx([60, 0, 0])


def test_background_error_counts_only_where_the_hole_is_zero():
    rng = np.random.default_rng(0)
    original = rng.integers(0, 200, (8, 8, 3), np.uint8)
    hole = np.zeros((8, 8), np.uint8)
    hole[2:5, 2:5] = 255
    hole[5, 2:5] = 1  # a soft edge
    made = original.copy()
    made[hole > 0] += 50
    assert metrics.background_error(made, original, hole) == (0, 0, 100)
    made[0, 0] += 12
    made[0, 1, 0] += 30
    mean, largest, psnr = metrics.background_error(made, original, hole)
    values = (64 - 12) * 3
    assert (mean, largest) == (pytest.approx(66 / values), 30)
    assert psnr == pytest.approx(10 * np.log10(255**2 / ((3 * 144 + 900) / values)))
    assert metrics.background_error(made, original, np.full_like(hole, 255)) == (0, 0, 100)


def test_diversity_is_the_mean_over_pairs_inside_the_hole():
    hole = np.zeros((4, 4), np.uint8)
    hole[1, 1:3] = 255
    hole[3] = 1
    pictures = [np.full((4, 4, 3), level, np.uint8) for level in (10, 250, 40)]
    pictures[0][0] = 99
    assert metrics.hole_distance(pictures[0], pictures[1], hole) == 240
    found = metrics.diversity(pictures, lambda a, b: metrics.hole_distance(a, b, hole))
    assert found == pytest.approx((240 + 30 + 210) / 3)


def test_masked_cosines_are_those_of_the_hole():
    generator = torch.Generator().manual_seed(0)
    patches, truth = torch.randn(2, 3, 16, 8, generator=generator)
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.int64)
    mask[0, 0, 1:3, 2] = 1
    mask[2] = 1
    found = metrics.masked_cosines(patches, truth, mask)
    expected = masked_cosine(patches, truth, mask.flatten(1))
    assert len(found) == 2 + 16
    assert found[:2].mean() == pytest.approx(expected[0].item())
    assert found[2:].mean() == pytest.approx(expected[2].item())
    counts = metrics.histogram(torch.tensor([-1.0, -0.98, 0.01, 0.99, 1.0000002]))
    assert len(counts) == len(metrics.HISTOGRAM) - 1
    assert counts[[0, 40, 79]].tolist() == [2, 1, 2]
    assert counts.sum() == 5


# Intervals ----------------------------------------------------------------------------------------


def resampled_means(values, resamples, seed):
    return metrics.resampled(lambda rows: values[rows].mean(), len(values), resamples, seed)


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(3, 2, 400)
    drawn = resampled_means(values, 2000, seed=1)
    low, high = metrics.interval(values.mean(), drawn)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert np.array_equal(drawn, resampled_means(values, 2000, seed=1))
    assert not np.array_equal(drawn, resampled_means(values, 2000, seed=2))


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    first = rng.normal(0, 10, 200)
    second = first + rng.normal(0.5, 0.5, 200)
    drawn = resampled_means(second, 500, seed=0) - resampled_means(first, 500, seed=0)
    low, high = metrics.interval(second.mean() - first.mean(), drawn)
    assert 0.3 < low < high < 0.7  # each mean on its own is known to 1.4 only
