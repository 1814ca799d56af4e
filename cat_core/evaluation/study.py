"""The paper's user study: a page on which people rate pictures blind, and the table of ratings.

The page shows what each method made of a picture side by side, in a random order that only the key
beside the page knows. How the page looks and works stands in study.html.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import how_to_install
from . import metrics
from .estimates import Estimate
from .metrics import EvaluationError, Missing
from .report import data_uri, hidden, template
from .results import Results, SampleSet

QUESTIONS = ("coherence", "alignment")
FORMAT = "cat-diffusion study ratings 1"
KEY_FORMAT = "cat-diffusion study key 1"
MOST_METHODS = 6
HIGHEST = 5


@dataclass(frozen=True)
class StudyKey:
    """Which method made what: of each shown picture its id and the methods in their order."""

    methods: list[str]
    ids: list[str]
    orders: list[list[int]]  # for each picture, numbers of methods from left to right

    @property
    def study(self) -> str:
        """A name for the study, from all of the above."""
        return hashlib.sha256(self._content().encode()).hexdigest()[:16]

    def text(self) -> str:
        """As JSON, for the file beside the page."""
        return self._content() + "\n"

    def _content(self) -> str:
        content = {
            "format": KEY_FORMAT,
            "methods": self.methods,
            "ids": self.ids,
            "orders": self.orders,
        }
        return json.dumps(content, indent=1)

    @classmethod
    def read(cls, path: Path) -> "StudyKey":
        """A key that was written; raises EvaluationError."""
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != KEY_FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            return cls(content["methods"], content["ids"], content["orders"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path} is no study's key ({error}); expected the file that --study wrote beside "
                "the page. Give it with --key."
            ) from error


def make_key(samples: SampleSet, names: Sequence[str], count: int, seed: int) -> StudyKey:
    """Choose pictures and orders at random.

    Args:
        samples: of which every method has the picture.
        names: of the methods.
        count: of pictures.
    Raises:
        EvaluationError: fewer than two methods or more than six, or too few pictures.
    """
    if not 2 <= len(names) <= MOST_METHODS:
        raise EvaluationError(
            f"There are {len(names)} folders; a study compares 2 to {MOST_METHODS}. Give so many."
        )
    if count > len(samples.records):
        raise EvaluationError(
            f"--pictures is {count}, and there are {len(samples.records)}. Give at most so many."
        )
    rng = np.random.default_rng(seed)
    places = rng.choice(len(samples.records), count, replace=False)
    orders = [rng.permutation(len(names)).tolist() for _ in places]
    return StudyKey(list(names), [samples.records[place].id for place in places], orders)


def study_page(key: StudyKey, samples: SampleSet, folders: Sequence[Results]) -> str:
    """The page, nothing outside of it needed; it names no method."""
    records = {record.id: record for record in samples.records}
    pictures = []
    for id, order in zip(key.ids, key.orders, strict=True):
        sample = samples.sample(records[id])
        results = [folders[number].picture(id, samples.size) for number in order]
        pictures.append(
            {
                "label": sample.record.label,
                "original": data_uri(hidden(sample)),
                "results": [data_uri(picture) for picture in results],
            }
        )
    study = {"id": key.study, "pictures": pictures}
    return template("study.html").render(study=study, title="Rate pictures")


# Ratings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyLine:
    """One question's mean for one method, and the difference to the first method."""

    question: str
    method: str
    ratings: int
    estimate: Estimate
    difference: Estimate | None


def read_ratings(key: StudyKey, paths: Sequence[Path]) -> np.ndarray:
    """Ratings by question, rater, picture and method; NaN where there is none.

    Raises EvaluationError: a file that is none, of another study, or one that was read before.
    """
    shape = (len(QUESTIONS), len(paths), len(key.ids), len(key.methods))
    ratings = np.full(shape, np.nan)
    files: dict[str, Path] = {}
    for rater, path in enumerate(paths):
        content = _read_file(key, path)
        digest = json.dumps(content["ratings"], sort_keys=True)
        if digest in files:
            raise EvaluationError(
                f"{path} holds the same ratings as {files[digest]}. Give each rater's file once."
            )
        files[digest] = path
        try:
            for rating in content["ratings"]:
                question = QUESTIONS.index(rating["question"])
                method = key.orders[rating["picture"]][rating["result"]]
                value = rating["value"]
                if type(value) is not int or not 0 <= value <= HIGHEST:
                    raise ValueError(f"a rating of {value!r}")
                ratings[question, rater, rating["picture"], method] = value
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{path} holds {error}, expected ratings from 0 to {HIGHEST} of the pictures that "
                "were shown. Export it again."
            ) from error
    return ratings


def _read_file(key: StudyKey, path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT or not isinstance(content["ratings"], list):
            raise ValueError(f"its format is {content['format']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} holds no ratings ({error}); expected the file that a study's page saved."
        ) from error
    if content["study"] != key.study:
        raise EvaluationError(
            f"{path} is of study {content['study']}, the key of {key.study}. Give the key and the "
            "ratings of one study."
        )
    if not content["ratings"]:
        raise EvaluationError(f"{path} holds no rating. Leave it out.")
    return content


def study_lines(key: StudyKey, ratings: np.ndarray, resamples: int, seed: int) -> list[StudyLine]:
    """The study's table; intervals draw raters and pictures anew, both at once.

    Args:
        ratings: as `read_ratings` returns them.
    """
    lines = []
    for question, values in zip(QUESTIONS, ratings, strict=True):
        first = values[..., 0]
        for number, method in enumerate(key.methods):
            own = values[..., number]
            estimate = _two_way(own, resamples, seed)
            difference = _two_way(own - first, resamples, seed) if number else None
            count = int(np.isfinite(own).sum())
            lines.append(StudyLine(question, method, count, estimate, difference))
    return lines


def _two_way(values: np.ndarray, resamples: int, seed: int) -> Estimate:
    """The mean of (raters, pictures), and its interval over both."""
    if not np.isfinite(values).any():
        raise EvaluationError(
            "A method has no rating, or none beside the first one's. Collect more ratings."
        )
    raters, pictures = values.shape
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(raters, size=raters)
        columns = rng.integers(pictures, size=pictures)
        part = values[np.ix_(rows, columns)]
        if np.isfinite(part).any():
            drawn.append(np.nanmean(part))
    value = float(np.nanmean(values))
    if not drawn:
        return Estimate(value)
    low, high = metrics.interval(value, np.array(drawn))
    return Estimate(value, float(low), float(high))


def agreement(ratings: np.ndarray) -> dict[str, float | None]:
    """Krippendorff's alpha of each question, for ratings on an interval scale; None if undefined.

    1 is perfect agreement, 0 what chance gives. It is undefined for one rater, or where all
    ratings are equal.

    Raises Missing: the krippendorff library is not installed.
    """
    try:
        import krippendorff
    except ImportError as error:
        raise Missing(
            f"agreement needs krippendorff ({error}). Install it with: "
            f"{how_to_install('requirements-evaluate.txt')}"
        ) from error
    alphas: dict[str, float | None] = {}
    for question, values in zip(QUESTIONS, ratings, strict=True):
        alphas[question] = _alpha(krippendorff.alpha, values.reshape(len(values), -1))
    return alphas


def _alpha(alpha: Callable, by_rater: np.ndarray) -> float | None:
    rated = np.isfinite(by_rater)
    is_paired = (rated.sum(axis=0) > 1).any()
    if not is_paired or len(np.unique(by_rater[rated])) < 2:
        return None
    return float(alpha(reliability_data=by_rater, level_of_measurement="interval"))


def study_table(lines: Sequence[StudyLine], alphas: Mapping[str, float | None]) -> str:
    """The table in Markdown, with the raters' agreement."""
    return template("study_table.md").render(lines=lines, alphas=alphas, questions=QUESTIONS)
