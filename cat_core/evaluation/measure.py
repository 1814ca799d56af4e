"""Every metric of one or several result folders, in one pass over the pictures.

Memory stays the same however many pictures there are.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from PIL import Image

from ..data.manifest import Record
from ..data.masks import MASKED
from . import metrics
from .extractors import Extractor, FeatureFile, OpenClip
from .more_networks import Lpips, PictureScore
from .results import Results, Sample, SampleSet, square_around_hole

LOCAL = 1.25  # side of Local FID's crop, in sides of the smallest square over the hole
OBJECT = 1.0  # the same for CLIP score
INSIDE = [0] + [255] * 255  # a hole's level -> whether it is no background
BATCH = 16  # pictures at once
WORKERS = 2  # threads that decode pictures while networks work
AHEAD = 2  # batches that wait for the networks


@dataclass(frozen=True)
class Features:
    """Of whole pictures and of their squares around the hole."""

    whole: FeatureFile = field(default_factory=FeatureFile)
    local: FeatureFile = field(default_factory=FeatureFile)
    # By metric, of whole pictures by its own network, see Networks.sets.
    sets: dict[str, FeatureFile] = field(default_factory=dict)

    def add(
        self, extractor: Extractor, pictures: Sequence[Image.Image], samples: Sequence[Sample]
    ) -> torch.Tensor:
        """Keep the features of some more pictures; returns those of the squares (B, D)."""
        self.whole.append(extractor(pictures))
        local = extractor(squares(pictures, samples, LOCAL))
        self.local.append(local)
        return local


@dataclass(frozen=True)
class MeasuredFolder:
    """What was measured in one folder: numbers by picture, and the features."""

    results: Results
    values: dict[str, list[float]] = field(default_factory=dict)
    features: Features = field(default_factory=Features)


@dataclass(frozen=True)
class Measured:
    """Everything `measure` found; rows of all features and values are the records in order."""

    samples: SampleSet
    folders: list[MeasuredFolder]
    real: Features = field(default_factory=Features)
    # By group, see `seeds`, and by metric: numbers by picture.
    diversity: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    hole_shares: list[float] = field(default_factory=list)  # of the pictures, by record

    @property
    def names(self) -> list[str]:
        """What the folders are called."""
        folders = [folder.results for folder in self.folders]
        return [results.name(folders) for results in folders]


@dataclass(frozen=True)
class Networks:
    """What some metrics need; each is left out without its network.

    Args:
        sets: extractors of whole pictures for the metrics cmmd and fd_dinov2.
        lpips: for what changed outside the hole.
        score: a function of somebody's own.
    """

    sets: Mapping[str, Extractor] = field(default_factory=dict)
    lpips: Lpips | None = None
    score: PictureScore | None = None


@dataclass(frozen=True)
class OpenedBatch:
    """Some samples, and for each folder the pictures that it holds of them."""

    samples: Sequence[Sample]
    made: Sequence[Sequence[Image.Image]]

    @classmethod
    def open(
        cls, samples: SampleSet, folders: Sequence[Results], records: Sequence[Record]
    ) -> "OpenedBatch":
        """Decode the pictures of some records; raises EvaluationError."""
        opened = list(map(samples.sample, records))
        made = []
        for results in folders:
            made.append([results.picture(record.id, samples.size) for record in records])
        return cls(opened, made)


@dataclass(frozen=True)
class PictureBatch:
    """Some samples, and what one folder made of them or the originals."""

    samples: Sequence[Sample]
    pictures: Sequence[Image.Image]
    crops: torch.Tensor | None  # features of the squares around the hole, with an extractor


def measure(
    samples: SampleSet,
    folders: Sequence[Results],
    extractor: Extractor | None = None,
    clip: OpenClip | None = None,
    on_progress: Callable[[int], object] = lambda count: None,
    networks: Networks | None = None,
) -> Measured:
    """Open each picture once and keep numbers and features of it.

    Args:
        samples: records that every folder has, see SampleSet.of_all.
        extractor: network of FID, Local FID and similarity; left out without one.
        clip: network of the CLIP score; left out without one.
        on_progress: called with the number of records that were measured since the last call.
        networks: of the metrics that need more.
    Raises:
        EvaluationError: a file cannot be used.
    """
    measured = Measured(samples, list(map(MeasuredFolder, folders)))
    networks = networks or Networks()
    groups = seeds(folders)
    for opened in _opened_batches(samples, folders):
        originals = [sample.picture for sample in opened.samples]
        measured.hole_shares.extend(map(hole_share, opened.samples))
        real = _batch(opened.samples, originals, measured.real, extractor)
        _add_sets(measured.real, networks, originals)
        made = []
        for folder, pictures in zip(measured.folders, opened.made, strict=True):
            batch = _batch(opened.samples, pictures, folder.features, extractor)
            _add_sets(folder.features, networks, pictures)
            _append(folder.values, background_errors(batch))
            if real.crops is not None and batch.crops is not None:
                similarity = metrics.cosine(batch.crops, real.crops)
                _append(folder.values, {"object_similarity": similarity})
            if clip:
                _append(folder.values, {"clip_score": clip_scores(batch, clip)})
            if networks.lpips:
                distances = background_lpips(batch, networks.lpips)
                _append(folder.values, {"background_lpips": distances})
            if networks.score:
                _append(folder.values, {"score": scores(batch, networks.score)})
            made.append(batch)
        for group, members in groups.items():
            values = measured.diversity.setdefault(group, {})
            _append(values, diversities([made[member] for member in members]))
        on_progress(len(opened.samples))
    return measured


def _opened_batches(samples: SampleSet, folders: Sequence[Results]) -> Iterator[OpenedBatch]:
    """The records' pictures, BATCH at once; threads decode the next ones meanwhile."""
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for start in range(0, len(samples.records), BATCH):
            records = samples.records[start : start + BATCH]
            waiting.append(pool.submit(OpenedBatch.open, samples, folders, records))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _add_sets(features: Features, networks: Networks, pictures: Sequence[Image.Image]) -> None:
    """Keep the features that whole sets are compared by."""
    for metric, extractor in networks.sets.items():
        features.sets.setdefault(metric, FeatureFile()).append(extractor(pictures))


def _batch(
    samples: Sequence[Sample],
    pictures: Sequence[Image.Image],
    features: Features,
    extractor: Extractor | None,
) -> PictureBatch:
    crops = features.add(extractor, pictures, samples) if extractor else None
    return PictureBatch(samples, pictures, crops)


def _append(values: dict[str, list[float]], more: Mapping[str, Iterable]) -> None:
    for metric, numbers in more.items():
        values.setdefault(metric, []).extend(map(float, numbers))


def squares(
    pictures: Sequence[Image.Image], samples: Sequence[Sample], enlarge: float
) -> list[Image.Image]:
    """The crops of pictures around the samples' holes, see square_around_hole."""
    crops = []
    for picture, sample in zip(pictures, samples, strict=True):
        crops.append(picture.crop(square_around_hole(sample.hole, enlarge)))
    return crops


def hole_share(sample: Sample) -> float:
    """How much of the picture is in the hole, 0 to 1."""
    return float((np.asarray(sample.hole) >= MASKED).mean())


def background_errors(batch: PictureBatch) -> dict[str, list[float]]:
    """The three background metrics of each picture."""
    values = {"background_mean": [], "background_max": [], "background_psnr": []}
    for sample, picture in zip(batch.samples, batch.pictures, strict=True):
        mean, largest, psnr = metrics.background_error(
            np.asarray(picture), np.asarray(sample.picture), np.asarray(sample.hole)
        )
        values["background_mean"].append(mean)
        values["background_max"].append(largest)
        values["background_psnr"].append(psnr)
    return values


def clip_scores(batch: PictureBatch, clip: OpenClip) -> torch.Tensor:
    """How well the label describes what is in the hole of each picture, (B,)."""
    objects = squares(batch.pictures, batch.samples, OBJECT)
    labels = [sample.record.label or "" for sample in batch.samples]
    return metrics.clip_score(clip.image(objects), clip.text(labels))


def background_lpips(batch: PictureBatch, lpips: Lpips) -> torch.Tensor:
    """How visible it is what changed outside the hole, (B,): the original is put into the hole."""
    originals = [sample.picture for sample in batch.samples]
    outside = []
    for sample, picture in zip(batch.samples, batch.pictures, strict=True):
        inside = sample.hole.point(INSIDE)
        outside.append(Image.composite(sample.picture, picture, inside))
    return lpips(outside, originals)


def scores(batch: PictureBatch, score: PictureScore) -> list[float]:
    """What somebody's own function says of each picture."""
    numbers = []
    for sample, picture in zip(batch.samples, batch.pictures, strict=True):
        record = sample.record
        numbers.append(score(picture, sample.hole, record.label or "", record.id))
    return numbers


def diversities(batches: Sequence[PictureBatch]) -> dict[str, list[float]]:
    """How different the pictures of each sample are, one from each batch."""
    pixels = []
    for row, sample in enumerate(batches[0].samples):
        pictures = [np.asarray(batch.pictures[row]) for batch in batches]
        distance = partial(metrics.hole_distance, hole=np.asarray(sample.hole))
        pixels.append(metrics.diversity(pictures, distance))
    crops = [batch.crops for batch in batches if batch.crops is not None]
    if not crops:
        return {"diversity_pixels": pixels}
    features = []
    for crops_of_sample in zip(*crops, strict=True):
        features.append(metrics.diversity(crops_of_sample, metrics.cosine_distance))
    return {"diversity_pixels": pixels, "diversity_features": features}


def seeds(folders: Sequence[Results]) -> dict[str, list[int]]:
    """Groups of folders that were made alike but for the seed, at least two of them.

    Returns:
        a name for each group, and its folders' places.
    """
    places_by_seed: dict[str, dict] = {}
    for place, results in enumerate(folders):
        if "seed" in results.run:
            alike = json.dumps({**results.run, "seed": None}, sort_keys=True)
            places_by_seed.setdefault(alike, {}).setdefault(results.run["seed"], place)
    groups = {}
    for places in places_by_seed.values():
        if len(places) > 1:
            members = list(places.values())
            title = f"{folders[members[0]].name(folders)} and {len(members) - 1} more seeds"
            groups[title] = members
    return groups
