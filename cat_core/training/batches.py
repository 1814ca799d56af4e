"""Training batches that depend on nothing but the step.

Holes: half the time the object's segment, half the time its bounding box, as the paper trains.
"""

import hashlib

import torch

from ..data.manifest import ManifestError
from ..data.masks import VARIANTS
from .encoding import Sample
from .objectives import Batch
from .settings import TrainingError
from .stores import SampleStore

TIMESTEPS = 1000  # of Stable Diffusion's noise schedule
# Share of samples that lose text and visual prompt together, for classifier-free guidance.
DROPPED = 0.1


class Batches:
    """(step, positions in the global batch) -> batch; the same on every machine, process and run.

    Every sample of the whole run has a number; its record, mask and noise follow from that number
    and the seed. A record that cannot be used is replaced by the next one.

    Args:
        batch_size: of the global batch.
        empty_context: the empty text's context (1, L, T), for diffusion's dropped samples.
    """

    def __init__(
        self,
        store: SampleStore,
        batch_size: int,
        seed: int,
        empty_context: torch.Tensor | None = None,
    ):
        if not len(store):
            raise ManifestError(
                "There is nothing to train on: the manifest has no record of this split."
            )
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.empty_context = empty_context
        self.epoch = -1  # that `order` is of
        self.order = torch.empty(0)

    @torch.no_grad()
    def __call__(self, step: int, positions: range) -> Batch:
        indices: list[int] = []
        samples: list[Sample] = []
        generators: list[torch.Generator] = []
        for position in positions:
            number = step * self.batch_size + position
            generator = torch.Generator().manual_seed(_mix(self.seed, number))
            variant = VARIANTS[int(torch.randint(2, (1,), generator=generator))]
            index, sample = self._usable(number, variant)
            indices.append(index)
            samples.append(sample)
            generators.append(generator)
        batch = self.store.batch(indices, samples)
        self._check_finite(indices, batch)
        if self.empty_context is not None:
            batch |= self._noise(batch["latent"].shape[1:], generators)
            dropped = batch["dropped"].view(-1, 1, 1)
            batch["context"] = torch.where(dropped, self.empty_context, batch["context"])
        # Encoders may have run in inference mode, whose tensors autograd does not take.
        return {key: value.clone() for key, value in batch.items()}

    def _check_finite(self, indices: list[int], batch: Batch) -> None:
        """Raise TrainingError, which names a sample, if one holds NaN or Inf."""
        for name, values in batch.items():
            good = values.isfinite().flatten(1).all(1)
            if not good.all():
                index = indices[good.tolist().index(False)]
                raise TrainingError(
                    f"{name} of record {self.store.records[index].id} holds NaN or Inf. "
                    f"{self.store.remedy(index)} What was trained so far is not touched."
                )

    def _usable(self, number: int, variant: str) -> tuple[int, Sample]:
        """The record of a sample's number, or the next one that can be used, and its sample."""
        for attempt in range(len(self.store)):
            index = self._index(number + attempt)
            sample = self.store.sample(index, variant)
            if sample is not None:
                return index, sample
        raise ManifestError("Not one record of the manifest can be used; see the report.")

    def _noise(self, shape: torch.Size, generators: list[torch.Generator]) -> Batch:
        """What the diffusion objective draws by chance, for each sample from its own generator."""
        noise = []
        timestep = []
        dropped = []
        for generator in generators:
            noise.append(torch.randn(shape, generator=generator))
            timestep.append(torch.randint(TIMESTEPS, (1,), generator=generator))
            dropped.append(torch.rand(1, generator=generator) < DROPPED)
        return {
            "noise": torch.stack(noise),
            "timestep": torch.cat(timestep),
            "dropped": torch.cat(dropped),
        }

    def _index(self, number: int) -> int:
        """The record of a sample's number: every epoch has an order of its own."""
        epoch, place = divmod(number, len(self.store))
        if self.epoch != epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, -1 - epoch))
            self.order = torch.randperm(len(self.store), generator=generator)
            self.epoch = epoch
        return int(self.order[place])


def _mix(seed: int, number: int) -> int:
    """A seed of 56 bits for one of a run's numbers, unlike those of its neighbours."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")
