"""From a manifest's records to training batches that depend on nothing but the step.

Holes: half the time the object's segment, half the time its bounding box, as the paper trains.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file

from .. import preprocess
from ..data import manifest, masks, tally
from ..data.masks import VARIANTS, training_mask
from .objectives import Batch

DROP = (
    0.1  # share of samples that lose text and visual prompt together, for classifier-free guidance
)


class Encoders(Protocol):
    """The frozen networks, supplied by a host. Pixels as in preprocess.py; everything returned is on the CPU."""

    def image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 224, 224) uint8 -> CLIP's patch features (B, N, D) and image feature (B, D)."""

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """-> CLIP's pooled text feature (B, T)."""

    def context(self, texts: Sequence[str]) -> torch.Tensor:
        """-> what the U-Net's cross-attention reads (B, 77, T)."""

    def latent(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w)."""


def prepare(
    record: manifest.Record, folder: Path, variant: str, size: int, cell: int
) -> dict[str, torch.Tensor]:
    """Everything that the encoders see of one record, without batch dimension.

    Args:
        size: side of the picture that the VAE encodes, in pixels.
        cell: pixels along one side of a latent cell.
    Raises:
        masks.SampleError: the files cannot be used.
    """
    picture, mask = masks.load(record, folder)
    hole = training_mask(mask, variant)
    image, hole = (_tensor(array) for array in (np.asarray(picture), np.asarray(hole)[..., None]))
    seen = preprocess.clip_input(image, hole)
    image, hole = (preprocess.resize(x, size, size) / 255 for x in (image, hole))
    prepared = {
        "whole": seen.image,
        "seen": seen.masked_image,
        "patch_mask": seen.patch_mask,
        "picture": preprocess.vae_input(image).float(),
        "masked_picture": preprocess.vae_input(image, hole).float(),
        "latent_mask": preprocess.latent_mask(hole, size // cell, size // cell, threshold=0),
    }
    return {key: value[0] for key, value in prepared.items()}


def encode(
    records: Sequence[manifest.Record], prepared: Sequence[dict], encoders: Encoders, objective: str
) -> Batch:
    """Run the frozen networks over samples made by `prepare`; keys as the objective wants them (see objectives.py)."""
    return encode_holes(prepared, encoders, objective) | encode_whole(
        records, prepared, encoders, objective
    )


def encode_holes(prepared: Sequence[dict], encoders: Encoders, objective: str) -> Batch:
    """What depends on the mask."""
    patches, image = encoders.image(_column(prepared, "seen"))
    batch = {
        "patches": patches.float(),
        "image": image.float(),
        "patch_mask": _column(prepared, "patch_mask"),
    }
    if objective == "diffusion":
        batch |= {
            "masked_latent": encoders.latent(_column(prepared, "masked_picture")).float(),
            "latent_mask": _column(prepared, "latent_mask"),
        }
    return batch


def encode_whole(
    records: Sequence[manifest.Record], prepared: Sequence[dict], encoders: Encoders, objective: str
) -> Batch:
    """What does not depend on the mask."""
    patches, image = encoders.image(_column(prepared, "whole"))
    batch = {
        "teacher_patches": patches,
        "teacher_image": image,
        "text": encoders.text([record.label or record.caption for record in records]),
    }
    if objective == "diffusion":
        batch |= {
            "latent": encoders.latent(_column(prepared, "picture")),
            "context": encoders.context([record.caption or record.label for record in records]),
        }
    return {key: value.float() for key, value in batch.items()}


class Fresh:
    """Encodes pictures each time they are asked for."""

    def __init__(
        self, records, folder: Path, encoders: Encoders, objective: str, size: int, cell: int
    ):
        self.records, self.folder, self.encoders, self.objective = (
            records,
            folder,
            encoders,
            objective,
        )
        self.size, self.cell = size, cell
        self.report = tally.Tally()
        self.bad: set[int] = set()

    def __len__(self):
        return len(self.records)

    def usable(self, index: int, variant: str) -> dict | None:
        """The prepared sample, or None (and a line in the report) if its files cannot be used."""
        try:
            return prepare(self.records[index], self.folder, variant, self.size, self.cell)
        except masks.SampleError as error:
            if index not in self.bad:
                self.bad.add(index)
                self.report.skip(error.reason, self.records[index].id)
            return None

    def batch(self, picks: Sequence[tuple[int, str]], prepared: Sequence[dict]) -> Batch:
        return encode(
            [self.records[index] for index, _ in picks], prepared, self.encoders, self.objective
        )


class Shards:
    """Encoded once, kept on disk in half precision: training then opens no picture and runs no encoder.

    Shards are written under a temporary name and renamed, so an interrupted `fill` continues.
    """

    per_shard = 64

    def __init__(self, folder: Path, fresh: Fresh):
        self.folder, self.fresh = folder, fresh
        facts = {
            "objective": fresh.objective,
            "size": fresh.size,
            "cell": fresh.cell,
            "records": hashlib.sha256(
                "\n".join(record.id for record in fresh.records).encode()
            ).hexdigest(),
        }
        path = folder / "cache.json"
        found = json.loads(path.read_text()) if path.exists() else facts
        self.borrowed = (
            found["objective"] == "diffusion" != fresh.objective
        )  # it holds all that distillation needs
        if found != facts | ({"objective": "diffusion"} if self.borrowed else {}):
            raise manifest.ManifestError(
                f"{folder} caches other data or settings ({found}). "
                "Give another cache folder or delete this one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        self.open_shards: dict = {}

    def __len__(self):
        return len(self.fresh)

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def fill(self, on_shard: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Encode what is not there yet."""
        total = -(-len(self.fresh) // self.per_shard)
        for number in range(total):
            if not self.path(number).exists():
                if self.borrowed:
                    raise manifest.ManifestError(
                        f"{self.folder} belongs to a diffusion stage and is not complete. "
                        "Start that stage first, or give another cache folder."
                    )
                self._write(number)
            on_shard(number + 1, total)

    def _write(self, number: int) -> None:
        tensors = {}
        indices = range(
            number * self.per_shard, min((number + 1) * self.per_shard, len(self.fresh))
        )
        encoders, objective = self.fresh.encoders, self.fresh.objective
        for variant in VARIANTS:
            with ThreadPoolExecutor() as threads:  # Pillow and numpy let other threads run
                prepared = dict(
                    zip(
                        indices,
                        threads.map(lambda index: self.fresh.usable(index, variant), indices),
                    )
                )
            good = [index for index in indices if prepared[index] is not None]
            for start in range(0, len(good), 8):
                some = good[start : start + 8]
                pictures = [prepared[index] for index in some]
                encoded = {variant: encode_holes(pictures, encoders, objective)}
                if variant == VARIANTS[0]:
                    encoded["both"] = encode_whole(
                        [self.fresh.records[index] for index in some], pictures, encoders, objective
                    )
                tensors |= {
                    f"{index}.{kind}.{key}": _small(value[row])
                    for kind, batch in encoded.items()
                    for key, value in batch.items()
                    for row, index in enumerate(some)
                }
        partial = self.path(number).with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial)
        os.replace(partial, self.path(number))

    def usable(self, index: int, variant: str) -> dict | None:
        number = index // self.per_shard
        if number not in self.open_shards:
            self.open_shards[number] = safetensors.safe_open(self.path(number), framework="pt")
            names: dict = {}
            for name in self.open_shards[number].keys():
                owner, kind, key = name.split(".", 2)
                if not (
                    self.borrowed and key in ("latent", "masked_latent", "latent_mask", "context")
                ):
                    names.setdefault((int(owner), kind), []).append((key, name))
            self.open_shards[number] = (self.open_shards[number], names)
        shard, names = self.open_shards[number]
        found = names.get((index, variant), [])
        return (
            {key: shard.get_tensor(name) for key, name in found + names.get((index, "both"), [])}
            if found
            else None
        )

    def batch(self, picks, prepared) -> Batch:
        return {
            key: value.float() if value.is_floating_point() else value.long()
            for key, value in _stack(prepared).items()
        }


class Kept:
    """Encoded once, kept in memory as it is: for small folders. 4 MB a record for stage 1 with CLIP ViT-L/14."""

    def __init__(self, fresh: Fresh):
        self.fresh = fresh
        self.kept: dict[tuple[int, str], dict | None] = {}

    def __len__(self):
        return len(self.fresh)

    def usable(self, index: int, variant: str) -> dict | None:
        if (index, variant) not in self.kept:
            sample = self.fresh.usable(index, variant)
            if sample is not None:
                sample = {
                    key: value[0].clone()
                    for key, value in self.fresh.batch([(index, variant)], [sample]).items()
                }
                for other in filter(None, (self.kept.get((index, other)) for other in VARIANTS)):
                    sample |= {key: value for key, value in other.items() if _shared(key)}
            self.kept[index, variant] = sample
        return self.kept[index, variant]

    def batch(self, picks, prepared) -> Batch:
        return _stack(prepared)


class Source:
    """(step, positions in the global batch) -> batch; the same on every machine, process and run.

    Every sample of the whole run has a number; its record, mask and noise follow from that number and the seed. A record
    that cannot be used is replaced by the next one.
    """

    def __init__(
        self,
        store: Fresh | Shards | Kept,
        batch_size: int,
        seed: int,
        empty_context: torch.Tensor | None = None,
    ):
        self.store, self.batch_size, self.seed, self.empty_context = (
            store,
            batch_size,
            seed,
            empty_context,
        )
        self.order: tuple[int, torch.Tensor] = (-1, torch.empty(0))
        if not len(store):
            raise manifest.ManifestError(
                "There is nothing to train on: the manifest has no record of this split."
            )

    def __call__(self, step: int, positions: range) -> Batch:
        picks, prepared, generators = [], [], []
        for position in positions:
            number = step * self.batch_size + position
            generator = torch.Generator().manual_seed(_mix(self.seed, number))
            variant = VARIANTS[int(torch.randint(2, (1,), generator=generator))]
            for attempt in range(len(self.store)):
                index = self._index(number + attempt)
                sample = self.store.usable(index, variant)
                if sample is not None:
                    break
            else:
                raise manifest.ManifestError(
                    "Not one record of the manifest can be used; see the report."
                )
            picks.append((index, variant))
            prepared.append(sample)
            generators.append(generator)
        batch = self.store.batch(picks, prepared)
        if "latent" in batch:
            shape = batch["latent"].shape[1:]
            batch["noise"] = torch.stack(
                [torch.randn(shape, generator=generator) for generator in generators]
            )
            batch["timestep"] = torch.cat(
                [torch.randint(1000, (1,), generator=generator) for generator in generators]
            )
            batch["dropped"] = torch.cat(
                [torch.rand(1, generator=generator) < DROP for generator in generators]
            )
            batch["context"] = torch.where(
                batch["dropped"].view(-1, 1, 1), self.empty_context, batch["context"]
            )
        return batch

    def _index(self, number: int) -> int:
        epoch, place = divmod(number, len(self.store))
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, -1 - epoch))
            self.order = (epoch, torch.randperm(len(self.store), generator=generator))
        return int(self.order[1][place])


def _mix(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def _shared(key: str) -> bool:
    """Whether a sample's tensor is the same for every variant of its hole."""
    return key.startswith("teacher_") or key in ("text", "context", "latent")


def _stack(samples: Sequence[dict]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def _column(prepared: Sequence[dict], key: str) -> torch.Tensor:
    return torch.stack([sample[key] for sample in prepared])


def _small(x: torch.Tensor) -> torch.Tensor:
    return (x.half() if x.is_floating_point() else x.to(torch.uint8)).contiguous()


def _tensor(array: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 -> (1, C, H, W) in [0, 1]."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
