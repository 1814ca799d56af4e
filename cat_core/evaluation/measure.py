"""Every metric of one or several result folders, in one pass over the pictures and in constant memory."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from . import metrics
from .extractors import Extractor, FeatureFile, OpenClip
from .metrics import Missing
from .results import Results, Sample, SampleSet, square_around_hole

LOCAL = 1.25  # side of Local FID's crop, in sides of the smallest square over the hole
OBJECT = 1.0  # the same for CLIP score
BATCH = 16  # pictures at once
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
    "clip_score": Metric("CLIP score (object and label)", "", "higher"),
    "object_similarity": Metric("Similarity to the original object (cosine)", "", "higher"),
    "background_mean": Metric("Background error, mean", "levels", "lower"),
    "background_max": Metric("Background error, largest", "levels", "lower"),
    "background_psnr": Metric("Background PSNR", "dB", "higher"),
    "diversity_pixels": Metric("Diversity across seeds, in the hole", "levels", "neither"),
    "diversity_features": Metric("Diversity across seeds (1 - cosine)", "", "neither"),
    "feature_cosine": Metric("Cosine to the true features in the hole", "", "higher"),
}
RANKING = (
    "clip_score",
    "object_similarity",
    "background_mean",
)  # the first that was measured ranks the pictures


@dataclass(frozen=True)
class Estimate:
    """A number and the 95 % interval of its resamples; None where it was not resampled."""

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


@dataclass(frozen=True)
class Features:
    """Of whole pictures and of their squares around the hole."""

    whole: FeatureFile = field(default_factory=FeatureFile)
    local: FeatureFile = field(default_factory=FeatureFile)

    def add(
        self,
        extractor: Extractor | None,
        pictures: Sequence[Image.Image],
        samples: Sequence[Sample],
    ) -> torch.Tensor | None:
        """Keep the features of some more pictures; returns those of the squares (B, D)."""
        if extractor is None:
            return None
        self.whole.append(extractor(pictures))
        local = extractor(
            [
                picture.crop(square_around_hole(s.hole, LOCAL))
                for picture, s in zip(pictures, samples)
            ]
        )
        self.local.append(local)
        return local


@dataclass(frozen=True)
class Folder:
    """What was measured in one folder: numbers by picture, and the features."""

    results: Results
    values: dict[str, list[float]] = field(default_factory=dict)
    features: Features = field(default_factory=Features)

    def add(self, metric: str, values: Sequence[float]) -> None:
        self.values.setdefault(metric, []).extend(float(value) for value in values)


@dataclass(frozen=True)
class Measured:
    """Everything `measure` found; rows of all features and values are the records in order."""

    samples: SampleSet
    folders: list[Folder]
    real: Features = field(default_factory=Features)
    diversity: dict[str, dict[str, list[float]]] = field(
        default_factory=dict
    )  # see `seeds` -> metric -> by picture


def measure(
    samples: SampleSet,
    folders: Sequence[Results],
    extractor: Extractor | None = None,
    clip: OpenClip | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Open each picture once and keep numbers and features of it.

    Args:
        samples: records that every folder has, see SampleSet.of_all.
        extractor: network of FID, Local FID and similarity; left out without one.
        clip: network of the CLIP score; left out without one.
    Raises:
        EvaluationError: a file cannot be used.
    """
    measured = Measured(samples, [Folder(results) for results in folders])
    groups = seeds(folders)
    for start in range(0, len(samples.records), BATCH):
        opened = [samples.sample(record) for record in samples.records[start : start + BATCH]]
        originals, holes = (
            [np.asarray(s.picture) for s in opened],
            [np.asarray(s.hole) for s in opened],
        )
        crops = [measured.real.add(extractor, [s.picture for s in opened], opened)]
        pictures = []
        for folder in measured.folders:
            made = [folder.results.picture(s.record.id, samples.size) for s in opened]
            pictures.append([np.asarray(picture) for picture in made])
            errors = map(metrics.background_error, pictures[-1], originals, holes)
            for metric, values in zip(
                ("background_mean", "background_max", "background_psnr"), zip(*errors)
            ):
                folder.add(metric, values)
            crops.append(folder.features.add(extractor, made, opened))
            if extractor:
                folder.add("object_similarity", metrics.cosine(crops[-1], crops[0]))
            if clip:
                objects = [
                    picture.crop(square_around_hole(s.hole, OBJECT))
                    for picture, s in zip(made, opened)
                ]
                folder.add(
                    "clip_score",
                    metrics.clip_score(
                        clip.image(objects), clip.text([s.record.label for s in opened])
                    ),
                )
        for group, members in groups.items():
            found = measured.diversity.setdefault(group, {"diversity_pixels": []})
            for row, hole in enumerate(holes):
                found["diversity_pixels"].append(
                    metrics.diversity(
                        [pictures[member][row] for member in members],
                        lambda a, b: metrics.hole_distance(a, b, hole),
                    )
                )
                if extractor:
                    found.setdefault("diversity_features", []).append(
                        metrics.diversity(
                            [crops[1 + member][row] for member in members],
                            lambda a, b: 1 - float(metrics.cosine(a, b)),
                        )
                    )
        on_progress(min(start + BATCH, len(samples.records)), len(samples.records))
    return measured


def seeds(folders: Sequence[Results]) -> dict[str, list[int]]:
    """Places of folders that were made alike but for the seed, at least two of them, by a name for the group."""
    groups: dict[str, dict] = {}
    for place, results in enumerate(folders):
        if "seed" in results.run:
            alike = json.dumps({**results.run, "seed": None}, sort_keys=True)
            groups.setdefault(alike, {}).setdefault(results.run["seed"], place)
    found = (list(members.values()) for members in groups.values() if len(members) > 1)
    return {
        f"{name(folders[members[0]], folders)} and {len(members) - 1} more seeds": members
        for members in found
    }


# The table ----------------------------------------------------------------------------------------------------------


def summary(
    measured: Measured, resamples: int, fid_resamples: int | None, seed: int
) -> tuple[list[Line], list[str]]:
    """All lines of the table, and notes on how to read them.

    Differences are to the first folder and paired: a resample draws the same records from both.

    Args:
        resamples: of means; 0 means no intervals.
        fid_resamples: of FID, which takes the features' width cubed; None means 100 up to 512 wide, else none.
    """
    count, lines, notes, everything = (
        len(measured.samples.records),
        [],
        [],
        [folder.results for folder in measured.folders],
    )
    width = measured.real.whole.width
    if fid_resamples is None:
        fid_resamples = 100 if width <= SMALL else 0
        if width > SMALL:
            notes.append(
                f"FID has no intervals: resampling {width}-wide features takes long. Ask with --fid-resamples 100."
            )
    if width > 0 and count <= width:
        notes.append(
            f"FID of {count} pictures with {width}-wide features: their covariance is singular, and FID depends on the "
            f"number of pictures. Compare only sets of equal size, or evaluate more than {width}."
        )
    for metric in METRICS:
        firsts: tuple[float, np.ndarray] | None = None
        for folder in measured.folders:
            statistic, draws = statistic_of(metric, folder, measured.real), resamples
            if statistic is None:
                continue
            if metric.endswith("fid"):
                draws = fid_resamples
            try:
                value = statistic(np.arange(count))
            except Missing as error:
                notes.append(f"{METRICS[metric].title} is left out: {error}")
                break
            drawn = metrics.resampled(statistic, count, draws, seed)
            lines.append(
                Line(
                    metric,
                    name(folder.results, everything),
                    count,
                    _estimate(value, drawn),
                    firsts and _estimate(value - firsts[0], drawn - firsts[1]),
                )
            )
            firsts = firsts or (value, drawn)
    for group, found in measured.diversity.items():
        lines += [
            mean_line(metric, group, values, resamples, seed) for metric, values in found.items()
        ]
    return lines, notes


def mean_line(
    metric: str, name: str, values: Sequence[float], resamples: int, seed: int, against=None
) -> Line:
    """The mean of numbers by picture, with the difference to those of the same pictures in `against`."""

    def estimate(numbers):
        return _estimate(
            numbers.mean(),
            metrics.resampled(lambda rows: numbers[rows].mean(), len(numbers), resamples, seed),
        )

    numbers = np.array(values)
    return Line(
        metric,
        name,
        len(numbers),
        estimate(numbers),
        None if against is None else estimate(numbers - against),
    )


def name(results: Results, folders: Sequence[Results]) -> str:
    """The folder's name, or its path where another folder is called the same."""
    same = sum(other.folder.name == results.folder.name for other in folders)
    return results.folder.name if same == 1 else results.folder.as_posix()


def statistic_of(
    metric: str, folder: Folder, real: Features
) -> Callable[[np.ndarray], float] | None:
    """Rows -> the metric of these records; None if it was not measured."""
    part = {"fid": "whole", "local_fid": "local"}.get(metric)
    if part:
        ours, theirs = getattr(folder.features, part), getattr(real, part)
        return (
            (lambda rows: metrics.frechet_distance(theirs.batches(rows), ours.batches(rows)))
            if ours.count
            else None
        )
    if metric not in folder.values:
        return None
    values = np.array(folder.values[metric])
    return lambda rows: values[rows].mean()


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    return Estimate(
        float(value), *(map(float, metrics.interval(value, drawn)) if len(drawn) else ())
    )
