"""Where encoded samples come from: the pictures themselves, shards on the disk, or memory.

A store has a length in records, `sample(index, variant)` and `batch(indices, samples)`, which
makes of the former's samples what an objective reads. What a sample holds is the store's own
affair.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from ..data.manifest import ManifestError, Record
from ..data.masks import VARIANTS, SampleError
from ..data.tally import Tally
from ..files import replacing, write_text
from .encoding import Encoders, Sample, encode, encode_holes, encode_whole, prepare, stack
from .objectives import Batch

BOTH = "both"  # a shard's kind for what is the same in every variant
LATENTS = {"latent", "masked_latent", "latent_mask", "context"}  # what distillation does not read
AT_ONCE = 8  # samples that go through the frozen networks when a shard is filled


class FreshSamples:
    """Encodes pictures each time they are asked for.

    Args:
        folder: the manifest's.
        objective: distillation or diffusion.
        size: side of the picture that the VAE encodes, in pixels.
        cell: pixels along one side of a latent cell.
        tally: counts the records that cannot be used.
    """

    def __init__(
        self,
        records: Sequence[Record],
        folder: Path,
        encoders: Encoders,
        *,
        objective: str,
        size: int = 512,
        cell: int = 8,
        tally: Tally | None = None,
    ):
        self.records = records
        self.folder = folder
        self.encoders = encoders
        self.objective = objective
        self.size = size
        self.cell = cell
        self.tally = tally or Tally()
        self.unusable: set[int] = set()

    def __len__(self):
        return len(self.records)

    def sample(self, index: int, variant: str) -> Sample | None:
        """The prepared sample, or None if its files cannot be used, which is counted once."""
        record = self.records[index]
        try:
            return prepare(record, self.folder, variant, self.size, self.cell)
        except SampleError as error:
            if index not in self.unusable:
                self.unusable.add(index)
                self.tally.skip(error.reason, record.id)
            return None

    def batch(self, indices: Sequence[int], samples: Sequence[Sample]) -> Batch:
        """Run the frozen networks over prepared samples."""
        records = [self.records[index] for index in indices]
        return encode(records, samples, self.encoders, self.objective)


class KeptSamples:
    """Encoded once, kept in memory as it is: for small folders.

    4 MB a record for stage 1 with CLIP ViT-L/14.
    """

    def __init__(self, fresh: FreshSamples):
        self.fresh = fresh
        self.kept: dict[tuple[int, str], Sample | None] = {}

    def __len__(self):
        return len(self.fresh)

    def sample(self, index: int, variant: str) -> Sample | None:
        """The encoded sample, or None if its files cannot be used."""
        if (index, variant) not in self.kept:
            self.kept[index, variant] = self._encoded(index, variant)
        return self.kept[index, variant]

    def _encoded(self, index: int, variant: str) -> Sample | None:
        prepared = self.fresh.sample(index, variant)
        if prepared is None:
            return None
        batch = self.fresh.batch([index], [prepared])
        sample = {key: value[0].clone() for key, value in batch.items()}
        for other in VARIANTS:
            twin = self.kept.get((index, other)) or {}
            # One tensor for all variants: CLIP's features of the whole picture are the largest.
            sample |= {key: value for key, value in twin.items() if _is_of_whole_picture(key)}
        return sample

    def batch(self, indices: Sequence[int], samples: Sequence[Sample]) -> Batch:
        """Encoded samples need but be stacked."""
        return stack(samples)


class ShardedSamples:
    """Encoded once, kept on disk in half precision.

    Training then opens no picture and runs no encoder. Shards are whole or not there, so an
    interrupted `fill` continues.

    Raises:
        ManifestError: the folder holds other data or settings.
    """

    per_shard = 64

    def __init__(self, folder: Path, fresh: FreshSamples):
        self.folder = folder
        self.fresh = fresh
        self.shards: dict[int, Shard] = {}  # those that are open
        ids = "\n".join(record.id for record in fresh.records)
        wanted = {
            "objective": fresh.objective,
            "size": fresh.size,
            "cell": fresh.cell,
            "records": hashlib.sha256(ids.encode()).hexdigest(),
        }
        path = folder / "cache.json"
        facts = json.loads(path.read_text()) if path.exists() else wanted
        # A diffusion stage's cache holds all that distillation needs.
        is_diffusion = facts["objective"] == "diffusion"
        self.borrowed = is_diffusion and fresh.objective != "diffusion"
        if self.borrowed:
            wanted["objective"] = "diffusion"
        if facts != wanted:
            raise ManifestError(
                f"{folder} caches other data or settings ({facts}). "
                "Give another cache folder or delete this one."
            )
        write_text(path, json.dumps(facts))

    def __len__(self):
        return len(self.fresh)

    @property
    def shard_count(self) -> int:
        return math.ceil(len(self.fresh) / self.per_shard)

    def fill(self, on_shard: Callable[[], object] | None = None) -> None:
        """Encode what is not there yet; `on_shard` is called after each shard.

        Raises:
            ManifestError: the cache is another stage's, and not complete.
        """
        for number in range(self.shard_count):
            if not self._path(number).exists():
                self._write(number)
            if on_shard:
                on_shard()

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def _write(self, number: int) -> None:
        if self.borrowed:
            raise ManifestError(
                f"{self.folder} belongs to a diffusion stage and is not complete. "
                "Start that stage first, or give another cache folder."
            )
        first = number * self.per_shard
        indices = range(first, min(first + self.per_shard, len(self.fresh)))
        tensors: dict[str, torch.Tensor] = {}
        for variant in VARIANTS:
            tensors |= self._encoded(indices, variant)
        with replacing(self._path(number)) as partial:
            save_file(tensors, partial)

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
        tensors: dict[str, torch.Tensor] = {}
        for start in range(0, len(usable), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            holes = encode_holes(samples[rows], encoders, objective)
            tensors |= _named(usable[rows], variant, holes)
            if variant == VARIANTS[0]:
                records = [self.fresh.records[index] for index in usable[rows]]
                whole = encode_whole(records, samples[rows], encoders, objective)
                tensors |= _named(usable[rows], BOTH, whole)
        return tensors

    def sample(self, index: int, variant: str) -> Sample | None:
        """The encoded sample in half precision, or None if its files could not be used."""
        number = index // self.per_shard
        if number not in self.shards:
            without = LATENTS if self.borrowed else set()
            self.shards[number] = Shard(self._path(number), without)
        return self.shards[number].sample(index, variant)

    def batch(self, indices: Sequence[int], samples: Sequence[Sample]) -> Batch:
        """Encoded samples, stacked and in full precision again."""
        batch = stack(samples)
        for key, value in batch.items():
            batch[key] = value.float() if value.is_floating_point() else value.long()
        return batch


class Shard:
    """A file of encoded samples, opened: its tensors are called INDEX.KIND.KEY.

    The kind is a variant, or "both".
    """

    def __init__(self, path: Path, without: set[str]):
        self.file = safetensors.safe_open(path, framework="pt")
        self.names: dict[tuple[int, str], dict[str, str]] = {}  # (index, kind) -> key -> name
        for name in self.file.keys():  # noqa: SIM118 - an open file is no mapping
            index, kind, key = name.split(".", 2)
            if key not in without:
                self.names.setdefault((int(index), kind), {})[key] = name

    def sample(self, index: int, variant: str) -> Sample | None:
        """A sample's tensors, or None if the shard has none."""
        if (index, variant) not in self.names:
            return None
        names = self.names[index, variant] | self.names.get((index, BOTH), {})
        return {key: self.file.get_tensor(name) for key, name in names.items()}


SampleStore = FreshSamples | KeptSamples | ShardedSamples


def _named(indices: Sequence[int], kind: str, batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as a shard's tensors: in half precision, one a sample."""
    tensors = {}
    for key, values in batch.items():
        for index, value in zip(indices, values, strict=True):
            small = value.half() if value.is_floating_point() else value.to(torch.uint8)
            tensors[f"{index}.{kind}.{key}"] = small.contiguous()
    return tensors


def _is_of_whole_picture(key: str) -> bool:
    """Whether a sample's tensor is the same for every variant of its hole."""
    return key.startswith("teacher_") or key in ("text", "context", "latent")
