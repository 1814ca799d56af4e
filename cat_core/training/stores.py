"""Where encoded samples come from: the pictures themselves, memory, or shards on the disk.

Worker processes get a store without its networks, and open files anew. shards.py has the store on
the disk.
"""

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.crops import Chance
from ..data.manifest import Record
from ..data.masks import VARIANTS, SampleError
from ..data.tally import Tally
from .encoding import OF_WHOLE, Encoders, Preparation, Sample, encode, prepare, stack
from .objectives import Batch


class SampleStore(Protocol):
    """Samples by the number of their record. What a sample holds is the store's own affair."""

    @property
    def records(self) -> Sequence[Record]:
        """What the samples are made of."""
        ...

    @property
    def unusable(self) -> Mapping[int, str]:
        """The records that were found to be so -> why."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int, variant: str, chance: Chance | None = None) -> Sample | None:
        """A record's sample, or None if its files cannot be used."""
        ...

    def batch(self, indices: Sequence[int], inputs: Batch, device: torch.device) -> Batch:
        """What an objective reads, made of samples, stacked."""
        ...

    def skip(self, index: int, reason: str) -> None:
        """Count a record that another process has found unusable, once."""
        ...

    def remedy(self, index: int) -> str:
        """What to do about a sample that is no number."""
        ...


class FreshSamples:
    """Encodes pictures each time they are asked for.

    Args:
        folder: the manifest's.
        encoders: None where samples are prepared and no more.
        objective: distillation or diffusion.
        size, cell, pictures, flip, caption_share, reads: see encoding.Preparation.
        tally: counts the records that cannot be used.
    """

    def __init__(
        self,
        records: Sequence[Record],
        folder: Path,
        encoders: Encoders | None,
        *,
        objective: str,
        size: int = 512,
        cell: int = 8,
        pictures: str = "squash",
        flip: bool = False,
        caption_share: float | None = None,
        reads: frozenset[str] | None = None,
        tally: Tally | None = None,
    ):
        self.records = records
        self.folder = folder
        self.encoders: Any = encoders
        self.objective = objective
        self.size = size
        self.cell = cell
        self.how = Preparation(objective, size, cell, pictures, flip, caption_share, reads)
        self.tally = tally or Tally()
        self.unusable: dict[int, str] = {}  # record -> why

    def __len__(self):
        return len(self.records)

    def reading(self, reads: frozenset[str]) -> "FreshSamples":
        """The same samples of which other keys are read; both count what cannot be used."""
        other = copy(self)
        other.encoders = self.encoders
        other.how = replace(self.how, reads=reads)
        return other

    def sample(self, index: int, variant: str, chance: Chance | None = None) -> Sample | None:
        """The prepared sample, or None if its files cannot be used, which is counted once.

        Args:
            chance: None means the record's own, which is always the same.
        """
        record = self.records[index]
        try:
            chance = chance or chance_of(f"record {record.id}")
            return prepare(record, self.folder, variant, self.how, chance)
        except SampleError as error:
            self.skip(index, error.reason)
            return None

    def skip(self, index: int, reason: str) -> None:
        """Count a record that cannot be used, once."""
        if index not in self.unusable:
            self.unusable[index] = reason
            self.tally.skip(reason, self.records[index].id)

    def batch(self, indices: Sequence[int], inputs: Batch, device: torch.device) -> Batch:
        """Run the frozen networks over prepared samples."""
        records = [self.records[index] for index in indices]
        batch = encode(records, inputs, self.encoders, self.how)
        return {key: value.to(device) for key, value in batch.items()}

    def __getstate__(self):
        return self.__dict__ | {"encoders": None}

    def remedy(self, index: int) -> str:
        """What to do about a sample that is no number."""
        return (
            "The frozen networks (CLIP, its text encoder, VAE) made it of "
            f"{self.records[index].image}: their weights are damaged, or their precision overflows."
        )


class EncodedSamples:
    """What is encoded once of other samples: their records, and those that cannot be used."""

    def __init__(self, fresh: FreshSamples):
        self.fresh = fresh

    def __len__(self):
        return len(self.fresh)

    @property
    def records(self) -> Sequence[Record]:
        return self.fresh.records

    @property
    def unusable(self) -> dict[int, str]:
        return self.fresh.unusable

    def skip(self, index: int, reason: str) -> None:
        """Count a record that cannot be used, once."""
        self.fresh.skip(index, reason)


class KeptSamples(EncodedSamples):
    """Encoded once, kept in memory as it is: for small folders.

    4 MB a record for stage 1 with CLIP ViT-L/14.
    """

    def __init__(self, fresh: FreshSamples):
        super().__init__(fresh)
        self.kept: dict[tuple[int, str], Sample | None] = {}

    def remedy(self, index: int) -> str:
        """What to do about a sample that is no number."""
        return self.fresh.remedy(index)

    def sample(self, index: int, variant: str, chance: Chance | None = None) -> Sample | None:
        """The encoded sample, or None if its files cannot be used.

        It was cut by the record's own chance, once for all.
        """
        if (index, variant) not in self.kept:
            self.kept[index, variant] = self._encoded(index, variant)
        return self.kept[index, variant]

    def _encoded(self, index: int, variant: str) -> Sample | None:
        prepared = self.fresh.sample(index, variant)
        if prepared is None:
            return None
        batch = self.fresh.batch([index], stack([prepared]), torch.device("cpu"))
        sample = {key: value[0].clone() for key, value in batch.items()}
        for other in VARIANTS:
            twin = self.kept.get((index, other)) or {}
            # One tensor for all variants: CLIP's features of the whole picture are the largest.
            sample |= {key: value for key, value in twin.items() if _is_of_whole_picture(key)}
        return sample

    def batch(self, indices: Sequence[int], inputs: Batch, device: torch.device) -> Batch:
        """Encoded samples are what is wanted."""
        return {key: value.to(device) for key, value in inputs.items()}


def chance_of(name: str) -> Chance:
    """The chance of a name, always the same."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return Chance(*(int.from_bytes(digest[i : i + 6], "big") / 2**48 for i in (0, 6, 12, 18)))


def _is_of_whole_picture(key: str) -> bool:
    """Whether a sample's tensor is the same for every variant of its hole."""
    return key in OF_WHOLE or key in ("text", "context", "latent")
