"""Encoded samples on the disk, which all processes of a run fill together and then read."""

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import safetensors
import torch

from ..data.crops import Chance
from ..data.manifest import ManifestError
from ..data.masks import VARIANTS
from ..errors import few
from ..files import InUseError, locked, remove_leftovers, replacing, write_text
from . import identity
from .encoding import Sample, encode_holes, encode_whole, stack
from .objectives import Batch
from .processes import Alone, Processes
from .settings import TrainingError
from .shard_file import (
    BOTH,
    UNREADABLE,
    About,
    Rows,
    Shard,
    Stamp,
    has_changed,
    save_shard,
    stamp,
)
from .stages import CACHE_DTYPES, LATENTS
from .stores import EncodedSamples, FreshSamples

AT_ONCE = 8  # samples that go through the frozen networks when a shard is filled
MOST_OPEN = 64  # shards; each is a mapping of a file, of which a process may have 65,530 on Linux
VERSION = 4  # of a cache's facts and shards; the first one had no number


class ShardedSamples(EncodedSamples):
    """Encoded once, kept on disk in half precision: what the samples' objective reads, no more.

    Training then opens no picture and runs no encoder. Shards are whole or not there, so an
    interrupted `fill` continues. A shard knows what it was encoded of, so records that have changed
    are encoded again, and what another stage reads besides is added. No more than MOST_OPEN shards
    are open at a time.

    Args:
        encoders: what the frozen networks are, see identity.of_parts. A cache that other ones
            filled is refused.
        dtype: one of stages.CACHE_DTYPES; int8 halves features of pictures, and rounds them by up
            to 1/254 of the largest number in each of their columns.
    Raises:
        ManifestError: the folder holds what other networks or settings gave.
        TrainingError: nothing can be written there.
    """

    per_shard = 64

    def __init__(
        self, folder: Path, fresh: FreshSamples, encoders: identity.Facts, dtype: str = "fp16"
    ):
        super().__init__(fresh)
        self.folder = folder
        self.shards: OrderedDict[int, Shard] = OrderedDict()  # open ones, the latest used last
        self.reads = fresh.how.keys
        self.dtype = dtype
        wanted = {
            "version": VERSION,
            "preprocessing": identity.PREPROCESSING,
            "dtype": dtype,
            **encoders,
        }
        if self.reads & LATENTS:
            wanted |= {"size": fresh.size, "cell": fresh.cell}
        wanted |= identity.of_preparation(fresh.how)
        path = folder / "cache.json"
        facts = {"dtype": CACHE_DTYPES[0]} | self._facts(path) if path.exists() else {}
        self.is_older = path.exists() and facts.get("version") != VERSION
        if self.is_older:
            facts = {}
        changes = identity.differences(facts, wanted)
        if changes:
            raise ManifestError(
                f"{folder} caches what other networks or settings gave ({'; '.join(changes)}). "
                "Give another cache folder or delete this one."
            )
        self.wanted = facts | wanted

    def _facts(self, path: Path) -> dict:
        """What a cache says of itself; raises ManifestError where that cannot be read."""
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError(f"expected an object, found {type(facts).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise ManifestError(
                f"{path} cannot be read ({error}), so nobody knows what the shards beside it hold. "
                "Give another cache folder or delete this one."
            ) from error
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
        """Encode what is not there yet, or has changed; `on_shard` is called after each shard.

        What is encoded again, or besides, is said on the terminal before it is.

        Args:
            processes: those of the run. Each encodes its share of the shards, and returns when all
                have; the first one keeps others out of the folder. None means this one alone.
        Raises:
            TrainingError: another process fills the cache; the disk is full or read-only.
        """
        processes = processes or Alone()
        with ExitStack() as stack:
            if processes.process_index == 0:
                self._lock(stack)
            processes.wait_for_everyone()  # until the folder is this run's
            share = self.share(processes)
            stale = self._stale(share)
            for number in share:
                if number in stale:
                    self._write(number, stale[number])
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
        with self._writing(path):
            write_text(path, json.dumps(self.wanted))

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def _indices(self, number: int) -> range:
        """The records of a shard."""
        first = number * self.per_shard
        return range(first, min(first + self.per_shard, len(self.fresh)))

    def _stale(self, share: Sequence[int]) -> dict[int, list[int]]:
        """Shards that have to be written -> their records that have to be encoded as a whole.

        Says which records have changed since they were encoded.
        """
        stale = {}
        changed: list[str] = []
        lacking: Counter[str] = Counter()
        for number in share:
            indices = self._indices(number)
            about = self._about(number)
            if about is None:
                stale[number] = list(indices)
                continue
            differing = self._differing(about, indices)
            lacks = self.reads - about.held
            if differing or lacks:
                stale[number] = differing
            if not self.is_older:
                known = [index for index in differing if index in about.contents]
                changed += [self.records[index].id for index in known]
                lacking.update(dict.fromkeys(lacks, len(indices) - len(differing)))
        if self.is_older and stale:
            print(
                f"\n{self.folder} was filled by an older version; its records are encoded again.",
                flush=True,
            )
        if changed:
            print(
                f"\n{self.folder}: {len(changed):,} records are encoded again, whose pictures, "
                f"masks or words have changed since: {few(changed)}.",
                flush=True,
            )
        if +lacking:
            print(
                f"\n{self.folder} was filled for another stage; of {max(lacking.values()):,} "
                f"records it lacks {few(sorted(+lacking))}, which are encoded besides.",
                flush=True,
            )
        return stale

    def _about(self, number: int) -> About | None:
        """What a shard was encoded of; None where there is none or it is damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            return Shard(path).about()
        except UNREADABLE as error:
            print(f"\n{path} is damaged ({error}); its records are encoded again.", flush=True)
            return None

    def _differing(self, about: About, indices: Sequence[int]) -> list[int]:
        """The records that are not what a shard was encoded of."""
        differing = []
        for index in indices:
            record = self.records[index]
            is_same = about.contents.get(index) == identity.of_record(record)
            for name in identity.files_of(record):
                is_same = is_same and not has_changed(
                    self.fresh.folder / name, about.files.get(name)
                )
            if not is_same:
                differing.append(index)
        return differing

    def _write(self, number: int, stale: Sequence[int]) -> None:
        """Encode a shard's stale records, and of the others what it lacks."""
        indices = self._indices(number)
        unchanged = [index for index in indices if index not in stale]
        rows: Rows = {}
        held: frozenset[str] = frozenset()
        files: dict[str, Stamp] = {}
        if unchanged:
            shard = Shard(self._path(number))
            rows = shard.rows_of(unchanged)
            files, _, held = shard.about()
            del shard  # whose file is replaced
        # Before the pictures are opened: one that changes meanwhile is noticed next time.
        names = set()
        for index in indices:
            names.update(identity.files_of(self.records[index]))
        for index in stale:
            for name in identity.files_of(self.records[index]):
                files[name] = stamp(self.fresh.folder / name)
        everything = self.reads | held
        self._encode(stale, everything, rows)
        lost: list[int] = []
        if self.reads - held:
            usable = [index for index in unchanged if (BOTH, index) in rows]
            lost = self._encode(usable, self.reads - held, rows)
        contents = {}
        for index in indices:
            if index not in lost:  # whose files may come back
                contents[index] = identity.of_record(self.records[index])
        path = self._path(number)
        files = {name: files[name] for name in sorted(names)}
        with self._writing(path), replacing(path) as unfinished:
            save_shard(unfinished, rows, About(files, contents, everything), self.dtype)

    def _encode(self, indices: Sequence[int], reads: frozenset[str], rows: Rows) -> list[int]:
        """Encode keys of records into rows; returns those that cannot be used: they have none."""
        fresh = self.fresh.reading(reads)
        lost = []
        for variant in VARIANTS:
            with ThreadPoolExecutor() as threads:  # Pillow and numpy let other threads run
                prepared = list(threads.map(partial(fresh.sample, variant=variant), indices))
            usable: list[int] = []
            samples: list[Sample] = []
            for index, sample in zip(indices, prepared, strict=True):
                if sample is not None:
                    usable.append(index)
                    samples.append(sample)
                else:
                    lost.append(index)
                    for kind in (*VARIANTS, BOTH):
                        rows.pop((kind, index), None)
            for start in range(0, len(usable), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                inputs = stack(samples[part])
                holes = encode_holes(inputs, fresh.encoders, fresh.how)
                self._add(rows, usable[part], variant, holes)
                if variant == VARIANTS[0]:
                    records = [self.records[index] for index in usable[part]]
                    wholes = encode_whole(records, inputs, fresh.encoders, fresh.how)
                    self._add(rows, usable[part], BOTH, wholes)
        return lost

    def _add(self, rows: Rows, indices: Sequence[int], kind: str, batch: Batch) -> None:
        """Records' encoded parts as a shard gives them, in half precision."""
        for index in indices:
            rows.setdefault((kind, index), {})
        for key, values in batch.items():
            small = values.half() if values.is_floating_point() else values.to(torch.uint8)
            good = small.isfinite().flatten(1).all(1)
            if not good.all():
                index = indices[good.tolist().index(False)]
                raise TrainingError(
                    f"{key} of record {self.records[index].id} holds NaN or Inf, or "
                    f"numbers beyond 65504. {self.fresh.remedy(index)}"
                )
            for index, value in zip(indices, small, strict=True):
                rows[kind, index][key] = value

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
            self.shards[number] = Shard(self._path(number), self.reads)
            if len(self.shards) > MOST_OPEN:
                self.shards.popitem(last=False)
        self.shards.move_to_end(number)
        return self.shards[number]

    def batch(self, indices: Sequence[int], inputs: Batch, device: torch.device) -> Batch:
        """Encoded samples in full precision again, for which they travel in half."""
        batch = {}
        for key, value in inputs.items():
            moved = value.to(device, non_blocking=True)
            batch[key] = moved.float() if moved.is_floating_point() else moved.long()
        return batch

    def __getstate__(self):
        return self.__dict__ | {"shards": OrderedDict()}
