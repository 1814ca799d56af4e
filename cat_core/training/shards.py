"""Encoded samples on the disk, which all processes of a run fill together and then read."""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from safetensors.torch import save_file

from ..data.crops import Chance
from ..data.manifest import ManifestError, Record
from ..data.masks import VARIANTS
from ..files import InUseError, locked, remove_leftovers, replacing, write_text
from . import identity
from .encoding import Sample, encode_holes, encode_whole, stack
from .objectives import Batch
from .settings import TrainingError
from .stores import FreshSamples

BOTH = "both"  # a shard's kind for what is the same in every variant
LATENTS = {"latent", "masked_latent", "latent_mask", "context"}  # what distillation does not read
AT_ONCE = 8  # samples that go through the frozen networks when a shard is filled
MOST_OPEN = 64  # shards; each is a mapping of a file, of which a process may have 65,530 on Linux
ROWS = "records"  # a shard's tensor that says which records a kind's rows are
VERSION = 3  # of a cache's facts and shards; the first one had no number
FILES = "files"  # what a shard's header calls the files that it was encoded of
UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError)

Stamp = list | None  # a file's [bytes, time, digest], None where there is none


class Processes(Protocol):
    """The processes that fill a cache together, as accelerate's PartialState tells of them."""

    num_processes: int
    process_index: int

    def wait_for_everyone(self) -> None:
        """Return when all have called this."""
        ...


@dataclass
class Alone:
    """One process, which waits for nobody."""

    num_processes: int = 1
    process_index: int = 0

    def wait_for_everyone(self) -> None:
        """Return at once."""


class ShardedSamples:
    """Encoded once, kept on disk in half precision.

    Training then opens no picture and runs no encoder. Shards are whole or not there, so an
    interrupted `fill` continues. No more than MOST_OPEN shards are open at a time.

    Args:
        encoders: what the frozen networks are, see identity.of_parts. A cache that other ones
            filled is refused.
    Raises:
        ManifestError: the folder holds other data or settings.
        TrainingError: nothing can be written there.
    """

    per_shard = 64

    def __init__(self, folder: Path, fresh: FreshSamples, encoders: identity.Facts):
        self.folder = folder
        self.fresh = fresh
        self.shards: OrderedDict[int, Shard] = OrderedDict()  # open ones, the latest used last
        wanted = {
            "version": VERSION,
            "objective": fresh.objective,
            "preprocessing": identity.PREPROCESSING,
            **identity.of_records(fresh.records),
            **encoders,
        }
        if fresh.objective == "diffusion":
            wanted |= {"size": fresh.size, "cell": fresh.cell}
        wanted |= identity.of_preparation(fresh.how)
        path = folder / "cache.json"
        facts = self._facts(path) if path.exists() else wanted
        # A diffusion stage's cache holds all that distillation needs.
        is_diffusion = facts.get("objective") == "diffusion"
        self.borrowed = is_diffusion and fresh.objective != "diffusion"
        if self.borrowed:
            wanted["objective"] = "diffusion"
        changes = identity.differences(facts, wanted)
        if changes:
            raise ManifestError(
                f"{folder} caches other data, networks or settings ({'; '.join(changes)}). "
                "Give another cache folder or delete this one."
            )
        self.wanted = wanted

    def _facts(self, path: Path) -> dict:
        """What a cache says of itself; raises ManifestError where that is not enough."""
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError(f"expected an object, found {type(facts).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise ManifestError(
                f"{path} cannot be read ({error}), so nobody knows what the shards beside it hold. "
                "Give another cache folder or delete this one."
            ) from error
        if "version" not in facts:
            raise ManifestError(
                f"{self.folder} was filled by an older version, which did not write down labels "
                "and the weights of the frozen networks: whether they are the same cannot be told. "
                "Give another cache folder or delete this one."
            )
        return facts

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Raise what goes wrong with the disk as TrainingError."""
        try:
            yield
        except (OSError, safetensors.SafetensorError) as error:
            raise TrainingError(
                f"Cannot write {path} ({error}). The shards before it are whole. Free disk space "
                "or check permissions, and start the same command again; it continues from there."
            ) from error

    def __len__(self):
        return len(self.fresh)

    @property
    def records(self) -> Sequence[Record]:
        return self.fresh.records

    def remedy(self, index: int) -> str:
        """What to do about a sample that is no number."""
        return (
            f"It lies in {self._path(index // self.per_shard)}: delete that file and start the "
            "same command again, which encodes its records anew."
        )

    @property
    def shard_count(self) -> int:
        return math.ceil(len(self.fresh) / self.per_shard)

    def fill(
        self, on_shard: Callable[[], object] | None = None, processes: Processes | None = None
    ) -> None:
        """Encode what is not there yet; `on_shard` is called after each shard.

        A shard that is damaged is encoded again, with a line on the terminal.

        Args:
            processes: those of the run. Each encodes its share of the shards, and returns when all
                have; the first one keeps others out of the folder. None means this one alone.
        Raises:
            ManifestError: the cache is another stage's, and not complete; pictures or masks have
                changed since they were encoded.
            TrainingError: another process fills the cache; the disk is full or read-only.
        """
        processes = processes or Alone()
        with ExitStack() as stack:
            if processes.process_index == 0:
                self._lock(stack)
            processes.wait_for_everyone()  # until the folder is this run's
            for number in self.share(processes):
                if not self._has(number):
                    self._write(number)
                if on_shard:
                    on_shard()
            processes.wait_for_everyone()

    def share(self, processes: Processes) -> range:
        """The shards that are encoded by this process."""
        return range(processes.process_index, self.shard_count, processes.num_processes)

    def _lock(self, stack: ExitStack) -> None:
        """Keep others out of the folder until the stack is closed, and write down what it holds."""
        try:
            stack.enter_context(locked(self.folder))
            remove_leftovers(self.folder)
        except InUseError as error:
            raise TrainingError(
                f"Another process fills the cache {self.folder}. Wait until it has done and "
                "start the same command again, or give another cache folder."
            ) from error
        except OSError as error:
            raise TrainingError(
                f"Cannot write to the cache {self.folder} ({error}). Check free space and "
                "permissions, or give another cache folder."
            ) from error
        path = self.folder / "cache.json"
        if not path.exists():
            with self._writing(path):
                write_text(path, json.dumps(self.wanted))

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def _indices(self, number: int) -> range:
        """The records of a shard."""
        first = number * self.per_shard
        return range(first, min(first + self.per_shard, len(self.fresh)))

    def _has(self, number: int) -> bool:
        """Whether a shard is there and whole; ManifestError where its files have changed."""
        path = self._path(number)
        if not path.exists():
            return False
        try:
            shard = Shard(path, set())
            files = shard.files()
        except UNREADABLE as error:
            print(f"\n{path} is damaged ({error}); its records are encoded again.", flush=True)
            return False
        for name, stamp in files.items():
            if _has_changed(self.fresh.folder / name, stamp):
                raise ManifestError(
                    f"{self.fresh.folder / name} has changed since {path} was encoded of it. "
                    "Delete that shard to encode it again, or give another cache folder."
                )
        return True

    def _write(self, number: int) -> None:
        if self.borrowed:
            raise ManifestError(
                f"{self.folder} belongs to a diffusion stage and is not complete. "
                "Start that stage first, or give another cache folder."
            )
        indices = self._indices(number)
        # Before the pictures are opened: one that changes meanwhile is noticed next time.
        files = {}
        for index in indices:
            for name in identity.files_of(self.fresh.records[index]):
                files[name] = _stamp(self.fresh.folder / name)
        tensors: dict[str, torch.Tensor] = {}
        for variant in VARIANTS:
            tensors |= self._encoded(indices, variant)
        path = self._path(number)
        with self._writing(path), replacing(path) as unfinished:
            save_file(tensors, unfinished, metadata={FILES: json.dumps(files)})

    def _encoded(self, indices: range, variant: str) -> dict[str, torch.Tensor]:
        """A shard's tensors of one variant; with the first one those that all variants share."""
        with ThreadPoolExecutor() as threads:  # Pillow and numpy let other threads run
            prepared = list(threads.map(partial(self.fresh.sample, variant=variant), indices))
        usable: list[int] = []
        samples: list[Sample] = []
        for index, sample in zip(indices, prepared, strict=True):
            if sample is not None:
                usable.append(index)
                samples.append(sample)

        encoders = self.fresh.encoders
        objective = self.fresh.objective
        holes: list[Batch] = []
        wholes: list[Batch] = []
        for start in range(0, len(usable), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            inputs = stack(samples[rows])
            holes.append(encode_holes(inputs, encoders, objective))
            if variant == VARIANTS[0]:
                records = [self.fresh.records[index] for index in usable[rows]]
                wholes.append(encode_whole(records, inputs, encoders, self.fresh.how))
        tensors = self._rows(usable, variant, holes)
        if variant == VARIANTS[0]:
            tensors |= self._rows(usable, BOTH, wholes)
        return tensors

    def _rows(
        self, indices: Sequence[int], kind: str, batches: Sequence[Batch]
    ) -> dict[str, torch.Tensor]:
        """Records' encoded parts as a shard holds them: one tensor a key, in half precision."""
        tensors = {f"{kind}.{ROWS}": torch.tensor(indices, dtype=torch.int64)}
        for key in batches[0] if batches else ():
            values = torch.cat([batch[key] for batch in batches])
            small = values.half() if values.is_floating_point() else values.to(torch.uint8)
            good = small.isfinite().flatten(1).all(1)
            if not good.all():
                index = indices[good.tolist().index(False)]
                raise TrainingError(
                    f"{key} of record {self.fresh.records[index].id} holds NaN or Inf, or "
                    f"numbers beyond 65504. {self.fresh.remedy(index)}"
                )
            tensors[f"{kind}.{key}"] = small.contiguous()
        return tensors

    def sample(self, index: int, variant: str, chance: Chance | None = None) -> Sample | None:
        """The encoded sample in half precision, or None if its files could not be used.

        It was cut by the record's own chance, once for all.
        """
        number = index // self.per_shard
        try:
            return self._opened(number).sample(index, variant)
        except UNREADABLE as error:
            raise TrainingError(
                f"{self._path(number)} cannot be read ({error}). Start the same command again: it "
                "encodes the shard anew and continues from the newest checkpoint."
            ) from error

    def _opened(self, number: int) -> "Shard":
        """An open shard; the one that was not used for the longest time makes room for it."""
        if number not in self.shards:
            without = LATENTS if self.borrowed else set()
            self.shards[number] = Shard(self._path(number), without)
            if len(self.shards) > MOST_OPEN:
                self.shards.popitem(last=False)
        self.shards.move_to_end(number)
        return self.shards[number]

    @property
    def unusable(self) -> dict[int, str]:
        return self.fresh.unusable

    def skip(self, index: int, reason: str) -> None:
        """Count a record that cannot be used, once."""
        self.fresh.skip(index, reason)

    def batch(self, indices: Sequence[int], inputs: Batch, device: torch.device) -> Batch:
        """Encoded samples in full precision again, for which they travel in half."""
        batch = {}
        for key, value in inputs.items():
            moved = value.to(device, non_blocking=True)
            batch[key] = moved.float() if moved.is_floating_point() else moved.long()
        return batch

    def __getstate__(self):
        return self.__dict__ | {"shards": OrderedDict()}


class Shard:
    """A file of encoded samples, opened: its tensors are called KIND.KEY, with a row a record.

    The kind is a variant, or "both". KIND.records says which records the rows are.
    """

    def __init__(self, path: Path, without: set[str]):
        self.file = safetensors.safe_open(path, framework="pt")
        self.keys: dict[str, list[str]] = {}  # kind -> keys
        self.rows: dict[str, dict[int, int]] = {}  # kind -> record -> row
        for name in self.file.keys():  # noqa: SIM118 - an open file is no mapping
            kind, key = name.split(".")
            if key == ROWS:
                records = self.file.get_tensor(name).tolist()
                self.rows[kind] = {record: row for row, record in enumerate(records)}
            elif key not in without:
                self.keys.setdefault(kind, []).append(key)

    def files(self) -> dict[str, Stamp]:
        """The files that it was encoded of, and how they were then."""
        return json.loads((self.file.metadata() or {}).get(FILES, "{}"))

    def sample(self, index: int, variant: str) -> Sample | None:
        """A sample's tensors, or None if the shard has none."""
        if index not in self.rows.get(variant, {}):
            return None
        sample = {}
        for kind in (variant, BOTH):
            for key in self.keys[kind]:
                row = self.rows[kind][index]
                sample[key] = self.file.get_slice(f"{kind}.{key}")[row]
        return sample


def _stamp(path: Path) -> Stamp:
    """A file's size, time and content; None where there is none."""
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, identity.of_file(path)]
    except OSError:
        return None


def _has_changed(path: Path, before: Stamp) -> bool:
    """Whether a file is another one; one that is gone counts as unchanged, it is not needed."""
    try:
        status = path.stat()
    except OSError:
        return False
    if before is None:
        return True
    size, time, content = before
    if status.st_size != size:
        return True
    # A copy of the data has other times.
    return status.st_mtime_ns != time and identity.of_file(path) != content
