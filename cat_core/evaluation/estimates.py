"""What was measured, as lines of a table: means with 95 % intervals, and differences to the first.

The intervals of means come from pictures drawn again, those of distances between sets from pictures
left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from . import distances, metrics
from .distances import Jackknifed, TooFew
from .extractors import FeatureFile
from .measure import LOCAL, Features, Measured, MeasuredFolder
from .metrics import Missing

SMALL = 512  # widest features whose FID is resampled unless told to


@dataclass(frozen=True)
class Metric:
    """What a number is called and how to read it."""

    title: str
    unit: str
    better: str  # higher, lower or neither


METRICS = {
    "fid": Metric("FID", "", "lower"),
    "local_fid": Metric(f"Local FID (square around the hole, x {LOCAL:g})", "", "lower"),
    "fid_limit": Metric("FID without the bias of few pictures", "", "lower"),
    "local_fid_limit": Metric("Local FID without the bias of few pictures", "", "lower"),
    "kid": Metric("KID (times 1000)", "", "lower"),
    "cmmd": Metric("CMMD", "", "lower"),
    "fd_dinov2": Metric("Fréchet distance, DINOv2", "", "lower"),
    "fd_dinov2_limit": Metric("The same without the bias of few pictures", "", "lower"),
    "clip_score": Metric("CLIP score (object and label)", "", "higher"),
    "object_similarity": Metric("Similarity to the original object (cosine)", "", "higher"),
    "background_mean": Metric("Background error, mean", "levels", "lower"),
    "background_max": Metric("Background error, largest", "levels", "lower"),
    "background_psnr": Metric("Background PSNR", "dB", "higher"),
    "background_lpips": Metric("Background LPIPS", "", "lower"),
    "score": Metric("Your score", "", "higher"),
    "diversity_pixels": Metric("Diversity across seeds, in the hole", "levels", "neither"),
    "diversity_features": Metric("Diversity across seeds (1 - cosine)", "", "neither"),
    "feature_cosine": Metric("Cosine to the true features in the hole", "", "higher"),
}
# The first of these that was measured ranks the pictures.
RANKING = ("clip_score", "object_similarity", "background_mean")


FRECHET = ("fid", "local_fid", "fd_dinov2")
LIMITS = {f"{metric}_limit": metric for metric in FRECHET}
MMDS = {"kid": distances.kid, "cmmd": distances.cmmd}


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One metric of one folder, and how far it lies from the first folder's (positive = larger)."""

    metric: str
    name: str
    images: int
    estimate: Estimate
    difference: Estimate | None = None


def summary(
    measured: Measured, resamples: int, fid_resamples: int | None, seed: int
) -> tuple[list[Line], list[str]]:
    """All lines of the table, and notes on how to read them.

    Differences are to the first folder and paired: a resample draws the same records from both.

    Args:
        resamples: of means; 0 means no intervals.
        fid_resamples: of FID, which takes the features' width cubed; None means 100 up to 512
            wide, else none.
    """
    count = len(measured.samples.records)
    width = measured.real.whole.width
    lines = []
    notes = _fid_notes(count, width, fid_resamples)
    if fid_resamples is None:
        fid_resamples = 100 if width <= SMALL else 0
    for metric in METRICS:
        try:
            if metric in LIMITS:
                lines += _limit_lines(metric, measured, fid_resamples, seed)
            elif metric in MMDS:
                lines += _mmd_lines(metric, measured, intervals=resamples > 0)
            else:
                draws = fid_resamples if metric in FRECHET else resamples
                lines += _metric_lines(metric, measured, draws, seed)
        except (Missing, TooFew) as error:
            notes.append(f"{METRICS[metric].title} is left out: {error}")
    for group, columns in measured.diversity.items():
        for metric, values in columns.items():
            lines.append(mean_line(metric, group, values, resamples, seed))
    return lines, notes


def _fid_notes(count: int, width: int, fid_resamples: int | None) -> list[str]:
    notes = []
    if fid_resamples is None and width > SMALL:
        notes.append(
            "FID's differences have no intervals, and its limit is left out: features "
            f"{width} wide take long. Ask with --fid-resamples 100."
        )
    if 0 < width >= count:
        notes.append(
            f"FID of {count} pictures with {width}-wide features: their covariance is singular, "
            "and FID depends on the number of pictures. Compare only sets of equal size, or "
            f"evaluate more than {width}."
        )
    return notes


def _metric_lines(metric: str, measured: Measured, resamples: int, seed: int) -> list[Line]:
    """A line for each folder in which the metric was measured; raises Missing."""
    count = len(measured.samples.records)
    lines = []
    first = None  # the value and the resamples that the others are compared with
    for title, folder in zip(measured.names, measured.folders, strict=True):
        statistic = statistic_of(metric, folder, measured.real)
        if statistic is None:
            continue
        value = statistic(np.arange(count))
        drawn = metrics.resampled(statistic, count, resamples, seed)
        difference = None
        if first is None:
            first = (value, drawn)
        else:
            difference = _estimate(value - first[0], drawn - first[1])
        estimate = _estimate(value, drawn)
        if metric in FRECHET:
            # Such an interval would miss the truth too often: see docs/evaluation.md.
            estimate = Estimate(float(value))
        lines.append(Line(metric, title, count, estimate, difference))
    return lines


def _limit_lines(metric: str, measured: Measured, resamples: int, seed: int) -> list[Line]:
    """A Fréchet distance without its bias, by the jackknife; raises Missing and TooFew.

    Args:
        resamples: 0 for none of it, as for the bootstrap.
    """
    count = len(measured.samples.records)
    numbers = {}
    for title, folder in zip(measured.names, measured.folders, strict=True):
        statistic = statistic_of(LIMITS[metric], folder, measured.real)
        if statistic is None or not resamples:
            continue
        width = set_of(LIMITS[metric], folder.features).width
        if count - count // distances.GROUPS - 1 <= width:
            raise TooFew(
                f"{count} pictures are too few for features {width} wide. Evaluate more than "
                f"{width * distances.GROUPS // (distances.GROUPS - 1) + 2}."
            )
        numbers[title] = distances.jackknifed_groups(statistic, count, seed)
    return _jackknifed_lines(metric, numbers, count, corrected=True)


def _mmd_lines(metric: str, measured: Measured, intervals: bool) -> list[Line]:
    """A distance by kernels, with its jackknife; raises TooFew."""
    count = len(measured.samples.records)
    numbers = {}
    for title, folder in zip(measured.names, measured.folders, strict=True):
        made = set_of(metric, folder.features)
        if made.count:
            numbers[title] = MMDS[metric](set_of(metric, measured.real), made)
    lines = _jackknifed_lines(metric, numbers, count, corrected=False)
    return lines if intervals else list(map(_without_intervals, lines))


def _jackknifed_lines(
    metric: str, numbers: Mapping[str, Jackknifed], count: int, corrected: bool
) -> list[Line]:
    """A line for each folder's number, and its difference to the first."""
    lines = []
    first = None
    for title, number in numbers.items():
        difference = None
        if first is None:
            first = number
        else:
            difference = _of_jackknife(number.minus(first), corrected)
        lines.append(Line(metric, title, count, _of_jackknife(number, corrected), difference))
    return lines


def _without_intervals(line: Line) -> Line:
    gap = line.difference
    difference = None if gap is None else Estimate(gap.value)
    return replace(line, estimate=Estimate(line.estimate.value), difference=difference)


def _of_jackknife(number: Jackknifed, corrected: bool) -> Estimate:
    value = number.corrected if corrected else number.value
    low, high = number.interval(value)
    return Estimate(float(value), float(low), float(high))


def mean_line(
    metric: str,
    name: str,
    values: Sequence[float],
    resamples: int,
    seed: int,
    against: Sequence[float] | None = None,
) -> Line:
    """The mean of numbers by picture, and how far it is from that of `against`.

    Args:
        against: other numbers of the same pictures.
    """

    def estimate(numbers: np.ndarray) -> Estimate:
        statistic = partial(_mean_of_rows, numbers)
        drawn = metrics.resampled(statistic, len(numbers), resamples, seed)
        return _estimate(numbers.mean(), drawn)

    numbers = np.array(values)
    difference = None if against is None else estimate(numbers - against)
    return Line(metric, name, len(numbers), estimate(numbers), difference)


def statistic_of(
    metric: str, folder: MeasuredFolder, real: Features
) -> Callable[[np.ndarray], float] | None:
    """Rows -> the metric of these records; None if it was not measured."""
    if metric in FRECHET:
        return _fid_of_rows(set_of(metric, real), set_of(metric, folder.features))
    if metric not in folder.values:
        return None
    return partial(_mean_of_rows, np.array(folder.values[metric]))


def set_of(metric: str, features: Features) -> FeatureFile:
    """The features that a distance compares; empty if there are none."""
    if metric in ("fid", "kid"):
        return features.whole
    if metric == "local_fid":
        return features.local
    return features.sets.get(metric, FeatureFile())


def _fid_of_rows(real: FeatureFile, made: FeatureFile) -> Callable[[np.ndarray], float] | None:
    if not made.count:
        return None

    def statistic(rows: np.ndarray) -> float:
        return metrics.frechet_distance(real.batches(rows), made.batches(rows))

    return statistic


def _mean_of_rows(numbers: np.ndarray, rows: np.ndarray) -> float:
    return numbers[rows].mean()


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    if len(drawn) == 0:
        return Estimate(float(value))
    low, high = metrics.interval(value, drawn)
    return Estimate(float(value), float(low), float(high))
