"""Distances between two sets of pictures whose uncertainty is known: KID, CMMD, FID's limit.

Row i of both sets is the same record, real and made. A jackknife leaves records out, one after
another or group by group, in both sets at once: what it tells of two methods is paired.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch

from .extractors import FeatureFile
from .metrics import EvaluationError

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (N, D), (M, D) -> (N, M)

BLOCK = 1024  # rows of a kernel at once
GROUPS = 20  # of records, that FID's jackknife leaves out in turn
KID_SCALE = 1000.0  # as papers print it
CMMD_SIGMA = 10.0  # of its Gaussian kernel, and
CMMD_SCALE = 1000.0  # what it is multiplied by: Jayasumana et al. 2024, section 4


class TooFew(EvaluationError):
    """There are not enough pictures for a metric; the others are measured."""


@dataclass(frozen=True)
class Jackknifed:
    """A number, and the numbers without each part of the records."""

    value: float
    without: np.ndarray  # (parts,)

    @property
    def corrected(self) -> float:
        """Without the bias that falls with the number of records as 1/N."""
        parts = len(self.without)
        return parts * self.value - (parts - 1) * self.without.mean()

    def minus(self, other: "Jackknifed") -> "Jackknifed":
        """The difference of two numbers of the same records, in the same parts."""
        return Jackknifed(self.value - other.value, self.without - other.without)

    def times(self, factor: float) -> "Jackknifed":
        """In another unit."""
        return Jackknifed(factor * self.value, factor * self.without)

    def interval(self, centre: float) -> tuple[float, float]:
        """95 % around `centre`, by Student's t with one degree of freedom less than parts."""
        parts = len(self.without)
        spread = np.square(self.without - self.without.mean()).sum()
        error = np.sqrt((parts - 1) / parts * spread)
        reach = scipy.stats.t.ppf(0.975, parts - 1) * error
        return centre - reach, centre + reach


def kid(real: FeatureFile, made: FeatureFile) -> Jackknifed:
    """KID, times 1000: unbiased squared MMD with the kernel (x y / D + 1)^3.

    Binkowski et al. 2018. A made picture is not compared with its own original, since they are
    alike outside the hole (Gretton et al. 2012, lemma 6). Of all records at once, not of random
    subsets, so that it is the same in every run.

    Raises TooFew: fewer than 3 records.
    """
    width = real.width

    def cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / width + 1) ** 3

    return _mmd(real, made, cubic, unbiased=True).times(KID_SCALE)


def cmmd(real: FeatureFile, made: FeatureFile) -> Jackknifed:
    """CMMD: 1000 times the squared MMD of normalised CLIP features, Gaussian kernel of sigma 10.

    With its authors' estimator, which counts each picture with itself.

    Raises TooFew: fewer than 3 records.
    """

    def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.normalize(x, dim=1)
        y = torch.nn.functional.normalize(y, dim=1)
        return CMMD_SCALE * torch.exp((x @ y.T - 1) / CMMD_SIGMA**2)

    return _mmd(real, made, gaussian, unbiased=False)


def _mmd(real: FeatureFile, made: FeatureFile, kernel: Kernel, unbiased: bool) -> Jackknifed:
    """Squared MMD, and without each record, from the kernel's row sums."""
    count = real.count
    if count < 3:
        raise TooFew(f"{count} pictures are too few for it and its interval. Evaluate 3 or more.")
    self_pairs = 0 if unbiased else 1
    within = 0.0
    rows_within = np.zeros(count)
    for features in (real, made):
        rows, diagonal = _row_sums(features, features, kernel)
        kept = diagonal * self_pairs
        # Taking record i away takes its row and its column, which share the diagonal.
        rows_within += 2 * (rows - diagonal) + kept
        within += (rows - diagonal + kept).sum()
    rows, diagonal = _row_sums(real, made, kernel)
    columns, _ = _row_sums(made, real, kernel)
    kept = diagonal * self_pairs
    across = (rows - diagonal + kept).sum()
    rows_across = rows + columns - 2 * diagonal + kept

    def statistic(within, across, count: int):
        pairs = count * (count - 1) if unbiased else count * count
        return (within - 2 * across) / pairs

    value = statistic(within, across, count)
    without = statistic(within - rows_within, across - rows_across, count - 1)
    return Jackknifed(float(value), without)


def _row_sums(
    first: FeatureFile, second: FeatureFile, kernel: Kernel
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over `second` for each row of `first`, and the kernel of equal rows; both (N,)."""
    sums = []
    diagonals = []
    start = 0
    for x in first.batches(size=BLOCK):
        total = torch.zeros(len(x), dtype=torch.float64)
        column = 0
        for y in second.batches(size=BLOCK):
            values = kernel(x.double(), y.double())
            total += values.sum(dim=1)
            if column == start:
                diagonals.append(values.diagonal())
            column += len(y)
        sums.append(total)
        start += len(x)
    return torch.cat(sums).numpy(), torch.cat(diagonals).numpy()


def jackknifed_groups(
    statistic: Callable[[np.ndarray], float], count: int, seed: int
) -> Jackknifed:
    """A statistic of all rows, and without each of GROUPS random groups of them.

    For statistics that are dear, such as FID, whose bias falls as 1/N.
    """
    order = np.random.default_rng(seed).permutation(count)
    without = []
    for left_out in _groups(order):
        without.append(statistic(np.setdiff1d(order, left_out)))
    return Jackknifed(statistic(np.arange(count)), np.array(without))


def _groups(order: np.ndarray) -> Iterator[np.ndarray]:
    yield from np.array_split(order, GROUPS)
