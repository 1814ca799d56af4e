"""Numbers from features and pixels. Which network made the features is the caller's business.

Pictures are (H, W, 3) uint8, holes (H, W) uint8 with white = repainted.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import CatError, how_to_install

LEVEL = 95  # per cent of the resamples that an interval covers
IDENTICAL = 100.0  # dB, the PSNR of what did not change: infinity has no mean
HISTOGRAM = np.linspace(-1, 1, 81)  # edges, of cosines


class EvaluationError(CatError):
    """Something that cannot be measured."""


class Missing(EvaluationError):
    """A library that is not installed, or weights that are not on this machine.

    One metric is left out then, the others are not.
    """


# Distances between sets ---------------------------------------------------------------------------


def frechet_distance(real: Iterable[torch.Tensor], made: Iterable[torch.Tensor]) -> float:
    """FID: the Fréchet distance of two Gaussians fitted to features, 0 for equal sets.

    Heusel et al. 2017, eq. 6. torchmetrics sums in float64 and keeps D x D numbers, however many
    batches come.

    Args:
        real: features of real pictures, any number of batches (B, D).
        made: features of made ones.
    Raises:
        EvaluationError: fewer than 2 features on a side.
        Missing: torchmetrics is not installed.
    """
    sums = None
    counts = {"real": 0, "made": 0}
    for side, batches in (("real", real), ("made", made)):
        for batch in batches:
            sums = sums or _frechet_sums(batch.shape[1])
            sums.update(batch.double(), real=side == "real")
            counts[side] += len(batch)
    if sums is None or min(counts.values()) < 2:
        raise EvaluationError(
            "FID compares covariances and needs at least 2 pictures on each side; found "
            f"{counts['real']} real and {counts['made']} made. Evaluate more pictures."
        )
    # Of equal sets rounding leaves a little more or less than nothing; no distance is negative.
    return max(float(sums.compute()), 0.0)


class _ReadyFeatures(torch.nn.Identity):
    """What torchmetrics takes for its network where the features are there already."""

    num_features: int


def _frechet_sums(width: int):
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise Missing(
            f"FID needs torchmetrics ({error}). Install it with: "
            f"{how_to_install('requirements-evaluate.txt')}"
        ) from error
    features = _ReadyFeatures()
    features.num_features = width
    return FrechetInceptionDistance(features)


# Numbers of one picture ---------------------------------------------------------------------------


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of features: (B, D) x 2 -> (B,) in [-1, 1]."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - cosine similarity of two features (D,), from 0 to 2."""
    return 1 - float(cosine(a, b))


def clip_score(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIP score, 100 max(cos, 0), of CLIP's image and text features.

    (B, D) x 2 -> (B,) in [0, 100], which is torchmetrics' scale.
    """
    return 100 * cosine(image, text).clamp(min=0)


def background_error(
    made: np.ndarray, original: np.ndarray, hole: np.ndarray
) -> tuple[float, float, float]:
    """What changed where nothing should.

    Background is where the hole is exactly 0: a soft edge may be repainted. Without any the error
    is 0.

    Returns:
        mean and largest absolute error (levels, 0 to 255), and PSNR (dB, at most 100).
    """
    outside = hole == 0
    error = np.abs(made[outside].astype(np.float64) - original[outside])
    if not error.any():
        return 0.0, 0.0, IDENTICAL
    psnr = 10 * np.log10(255**2 / np.square(error).mean())
    return error.mean(), error.max(), min(psnr, IDENTICAL)


def hole_distance(a: np.ndarray, b: np.ndarray, hole: np.ndarray) -> float:
    """Mean absolute difference inside the hole, in levels, 0 to 255.

    Inside is all that is not background.
    """
    inside = hole > 0
    return float(np.abs(a[inside].astype(np.float64) - b[inside]).mean())


def diversity(items: Sequence, distance: Callable) -> float:
    """Mean distance of all pairs of one sample's pictures that were made with other seeds."""
    pairs = itertools.combinations(items, 2)
    return float(np.mean(list(itertools.starmap(distance, pairs))))


def masked_cosines(
    patches: torch.Tensor, truth: torch.Tensor, patch_mask: torch.Tensor
) -> torch.Tensor:
    """Cosines of masked patches to the true ones.

    (B, N, D) x 2, (B, 1, G, G) -> (M,), M masked patches in all.
    """
    return cosine(patches, truth)[patch_mask.flatten(1).bool()]


def histogram(cosines: torch.Tensor) -> np.ndarray:
    """Counts in 80 equal bins over [-1, 1]; counts of several calls add up."""
    return np.histogram(cosines.double().clamp(-1, 1).numpy(), HISTOGRAM)[0]


# How sure -----------------------------------------------------------------------------------------


def resampled(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int, seed: int
) -> np.ndarray:
    """Bootstrap: `statistic` of the rows drawn with replacement, (resamples,).

    Two statistics of the same count and seed see the same rows, so the difference of the results
    is a paired one.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = rng.integers(count, size=count)
        values.append(statistic(rows))
    return np.array(values)


def interval(value: float, resamples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the resampled values, moved so that their mean lies on `value`.

    A mean's resamples lie there anyway. Those of FID lie above it, since a resample repeats
    pictures; only their spread counts, and with few pictures it is rather too wide.
    """
    percentiles = ((100 - LEVEL) / 2, (100 + LEVEL) / 2)
    low, high = np.percentile(resamples, percentiles) - resamples.mean()
    return value + low, value + high
