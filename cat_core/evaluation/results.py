"""What is compared: a manifest's pictures and holes, and folders of finished pictures.

One such folder is made by tools/generate.py for one method.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data import manifest, masks
from ..data.folder import PICTURES
from ..data.manifest import Record
from ..errors import few
from ..pictures import opening
from .metrics import EvaluationError

RUN = "run.json"
FAILED = "failed.jsonl"
ENDINGS = tuple(spelt for ending in PICTURES for spelt in (ending, ending.upper()))
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".jp2")


@dataclass(frozen=True)
class Results:
    """A folder with `<id>.png` for each sample, or in another format where it has no PNG at all.

    Its `run.json` says how they were made, `failed.jsonl` what could not be.
    """

    folder: Path
    run: dict

    @classmethod
    def open(cls, folder: Path) -> "Results":
        """Read run.json, if there is one; raises EvaluationError."""
        if not folder.is_dir():
            raise EvaluationError(
                f"{folder} is not a folder, expected one with a PNG for each sample. "
                "Make them with tools/generate.py."
            )
        path = folder / RUN
        if not path.exists():
            return cls(folder, {})
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(run, dict):
                raise ValueError(f"found a {type(run).__name__}")
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{path} cannot be read ({error}), expected a JSON object. Delete it and give "
                "--manifest, --split, --hole and --size yourself."
            ) from error
        return cls(folder, run)

    @property
    def failed(self) -> set[str]:
        """Ids of the samples that could not be made; raises EvaluationError."""
        path = self.folder / FAILED
        if not path.exists():
            return set()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return {json.loads(line)["id"] for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f'{path} cannot be read ({error}), expected lines such as {{"id": "611c"}}. '
                "Delete it and let tools/generate.py write it again."
            ) from error

    @property
    def ids(self) -> set[str]:
        """Of the pictures that are there."""
        return {Path(name).stem for name in self._names()}

    @property
    def notes(self) -> list[str]:
        """What makes the numbers of this folder differ from those of PNG files."""
        endings = {Path(name).suffix for name in self._names()}
        lossy = sorted(ending for ending in endings if ending.lower() in LOSSY)
        if not lossy:
            return []
        return [
            f"{self.folder} holds {few(lossy)} files instead of PNG: what their compression "
            "changed counts as background error."
        ]

    def _names(self) -> list[str]:
        """Of the pictures: the PNG files, or where there are none those of other formats."""
        names = [path.name for path in self.folder.iterdir() if path.suffix in ENDINGS]
        of_png = [name for name in names if name.lower().endswith(".png")]
        return of_png or names

    def _path(self, id: str) -> Path:
        """The file of a picture that is there; a PNG file first."""
        for ending in ENDINGS:
            path = self.folder / f"{id}{ending}"
            if path.is_file():
                return path
        return self.folder / f"{id}.png"

    def name(self, folders: Sequence["Results"]) -> str:
        """The folder's name, or its path where another of the folders is called the same."""
        same = sum(other.folder.name == self.folder.name for other in folders)
        return self.folder.name if same == 1 else self.folder.as_posix()

    def picture(self, id: str, size: int) -> Image.Image:
        """The finished picture, RGB, size x size; raises EvaluationError."""
        with self._open(id, size) as file:
            return opening.as_rgb(file)

    def check(self, id: str, size: int) -> None:
        """Raise EvaluationError unless the file's header tells of a picture of that size.

        Its pixels are not read.
        """
        with self._open(id, size):
            pass

    @contextmanager
    def _open(self, id: str, size: int) -> Iterator[Image.Image]:
        path = self._path(id)
        try:
            with opening.opened(path) as file:
                if file.size != (size, size):
                    raise EvaluationError(
                        f"{path} is {file.width}x{file.height}, expected {size}x{size}. Give the "
                        "--size that it was made with, or delete it and let tools/generate.py "
                        "make it again."
                    )
                yield file
        except EvaluationError:
            raise
        # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for what is broken.
        except Exception as error:
            raise EvaluationError(
                f"{path} cannot be decoded ({error}), expected a picture. Delete it and let "
                "tools/generate.py make it again."
            ) from error


@dataclass(frozen=True)
class Sample:
    """One record's picture and hole, as a method saw them."""

    record: Record
    picture: Image.Image  # RGB, size x size, nothing removed
    hole: Image.Image  # L, size x size, white = repaint


@dataclass(frozen=True)
class SampleSet:
    """Records of a manifest and the holes cut into them.

    Args:
        hole: segment, box or official-box, see masks.cut_hole.
        size: side of the pictures in pixels.
    """

    manifest: Path
    split: str | None  # None = all
    hole: str
    size: int
    records: tuple[Record, ...] = ()

    def read(self) -> "SampleSet":
        """With the manifest's records that have an object; raises manifest.ManifestError."""
        records = manifest.stream(self.manifest, self.split)
        return self.with_records(record for record in records if record.hole)

    def with_records(self, records: Iterable[Record]) -> "SampleSet":
        """The same holes, cut into other pictures."""
        return dataclasses.replace(self, records=tuple(records))

    def sample(self, record: Record) -> Sample:
        """Open a record's files; raises EvaluationError."""
        try:
            picture, mask = masks.load(record, self.manifest.parent)
            hole = masks.cut_hole(record, mask, self.hole)
        except masks.SampleError as error:
            raise EvaluationError(
                f"{record.id} of {self.manifest} cannot be used: {error}. Repair the data, or "
                "delete the pictures made from it and give --common."
            ) from error
        size = (self.size, self.size)
        return Sample(
            record,
            picture.resize(size, Image.Resampling.BICUBIC),
            hole.resize(size, Image.Resampling.BICUBIC),
        )

    def of_all(self, folders: Sequence[Results], common: bool) -> tuple["SampleSet", list[str]]:
        """With the records that every folder has a picture of, and notes on what was left out.

        Each picture is checked by its header. What failed in one folder is left out of all.

        Args:
            common: leave out what is missing for other reasons, too. Without it that is an error.
        Raises:
            EvaluationError: pictures are missing, belong to no record, are of another size or
                fewer than 2.
        """
        shared = list(self.records)
        notes = []
        problems = []
        for results in folders:
            notes += results.notes
            ids = results.ids
            lost = self._lost(results, ids)
            shared = [record for record in shared if record.id in ids]
            if not common:
                problems += self._mismatches(results, ids, lost)
            if lost:
                notes.append(
                    f"{len(lost)} samples are left out, since they failed in {results.folder}: "
                    f"{few(lost)}."
                )
        if problems:
            raise EvaluationError(
                f"The pictures do not match {self._name()}. {' '.join(problems)} Let "
                "tools/generate.py finish, give the manifest and split they were made from, or "
                f"evaluate the {len(shared)} that all have with --common."
            )
        if len(shared) < 2:
            raise EvaluationError(
                f"{len(shared)} of {len(self.records)} pictures of {self._name()} to evaluate; "
                "FID and intervals need at least 2. Evaluate more pictures."
            )
        if common and len(shared) < len(self.records):
            notes.append(
                f"Only the {len(shared)} of {len(self.records)} pictures that all folders have "
                "were evaluated."
            )
        for results in folders:
            for record in shared:
                results.check(record.id, self.size)
        return self.with_records(shared), notes

    def _lost(self, results: Results, ids: set[str]) -> list[str]:
        """Ids of the records that failed in a folder and have no picture there."""
        failed = results.failed - ids
        return [record.id for record in self.records if record.id in failed]

    def _mismatches(self, results: Results, ids: set[str], lost: Sequence[str]) -> list[str]:
        """Sentences on the pictures that a folder lacks or has too many."""
        wanted = [record.id for record in self.records]
        settled = ids.union(lost)
        missing = [id for id in wanted if id not in settled]
        unknown = sorted(ids.difference(wanted))
        sentences = []
        if missing:
            sentences.append(
                f"{results.folder} lacks {len(missing)} of {len(wanted)} pictures: {few(missing)}."
            )
        if unknown:
            sentences.append(
                f"{results.folder} has {len(unknown)} pictures that no record asks for: "
                f"{few(unknown)}."
            )
        return sentences

    def _name(self) -> str:
        split = f"split {self.split}" if self.split else "all splits"
        return f"{self.manifest} ({split})"


def square_around_hole(hole: Image.Image, enlarge: float) -> tuple[int, int, int, int]:
    """The crop around an object: the smallest square over the hole's bounding box, enlarged.

    The square has the box's centre, is moved inside the picture where it sticks out, and is as
    large as the picture at most.

    Args:
        hole: L, white = repaint; 128 and above counts.
        enlarge: how much longer its side becomes, 1 or more.
    Returns:
        left, top, right, bottom in pixels; always a square.
    """
    box = hole.point(masks.BINARY).getbbox()
    left, top, right, bottom = box or (0, 0, *hole.size)
    longest = max(right - left, bottom - top)
    side = min(round(longest * enlarge), *hole.size)
    x = _inside(round((left + right - side) / 2), hole.width - side)
    y = _inside(round((top + bottom - side) / 2), hole.height - side)
    return x, y, x + side, y + side


def _inside(value: int, most: int) -> int:
    return min(max(value, 0), most)
