"""The folder in which a run keeps its pictures, and goes on where an earlier one ended."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cat_diffusion.cat_core import files
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.errors import CatError


class GenerateError(CatError):
    """The run cannot go on; what is finished stays."""


@dataclass(frozen=True)
class MadePicture:
    """A finished picture, and where it was made."""

    picture: Image.Image
    place: dict  # the server, or the device
    seconds: float


class ResultsWriter:
    """The folder of a run: for every sample ID.png and then ID.json, whole or not at all.

    Args:
        method: what all results must have in common, of the method.
        more: what run.json tells besides.
    Raises:
        GenerateError: the folder holds another run's results or cannot be written.
    """

    def __init__(self, folder: Path, arguments, method: dict, more: dict):
        self.folder = folder
        self.size = arguments.size
        self.failed = folder / "failed.jsonl"
        self.common = {
            "hole": arguments.hole,
            "size": arguments.size,
            **method,
        }
        run = {
            "manifest": str(arguments.manifest.absolute()),
            "split": arguments.split,
            "seed": arguments.seed,
            **self.common,
            **more,
        }
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._check_run(run)
            for leftover in folder.glob("*.partial"):  # of a run that was killed
                leftover.unlink(missing_ok=True)
            files.write_text(folder / "run.json", json.dumps(run, indent=1))
            self.failed.write_text("")

    def _check_run(self, run: dict) -> None:
        """Raise GenerateError if the folder holds another run's results."""
        earlier = _json_object(self.folder / "run.json")
        if not earlier:
            return
        for key in ("split", "seed", *self.common):
            if earlier.get(key) != run[key]:
                raise GenerateError(
                    f"{self.folder} holds a run with {key} {earlier.get(key)}, not {run[key]}. "
                    "Choose another --out, or delete that folder."
                )

    def facts(self, record: Record, seed: int) -> dict:
        """What must be the same for a result to count as finished."""
        label = record.label or record.caption
        return {"id": record.id, "label": label, "seed": seed, **self.common}

    def finished(self, record: Record, seed: int) -> bool:
        """Whether the sample's files are there, whole, and made like this."""
        written = _json_object(self.folder / f"{record.id}.json")
        for key, value in self.facts(record, seed).items():
            if written.get(key) != value:
                return False
        path = self.folder / f"{record.id}.png"
        try:
            with Image.open(path) as picture:
                picture.verify()
            with Image.open(path) as picture:
                picture.load()
                return picture.size == (self.size, self.size)
        # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for what is broken.
        except Exception:
            return False

    def discard(self, record: Record) -> None:
        """Take away what is there of a sample that is not finished.

        It may fail now, and must not be measured then.
        """
        with self._writing():
            for suffix in (".json", ".png"):
                (self.folder / f"{record.id}{suffix}").unlink(missing_ok=True)

    def write(self, record: Record, seed: int, made: MadePicture) -> None:
        """Keep a finished picture."""
        about = {**self.facts(record, seed), **made.place, "seconds": made.seconds}
        with self._writing():
            with files.replacing(self.folder / f"{record.id}.png") as partial:
                made.picture.save(partial, "PNG")
            files.write_text(self.folder / f"{record.id}.json", json.dumps(about, indent=1))

    def name_failed(self, id: str, error: SampleError) -> None:
        """Put a sample that has no result, and why, on the list."""
        line = json.dumps({"id": id, "reason": error.reason, "detail": error.detail})
        with self._writing(), open(self.failed, "a", encoding="ascii") as file:
            file.write(line + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GenerateError(
                f"Cannot write to {self.folder}: {error}. Check free space and permissions, then "
                "run the same command again."
            ) from error


def _json_object(path: Path) -> dict:
    """The JSON object in a file; empty where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
