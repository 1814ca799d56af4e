"""Training batches that depend on nothing but the step.

Holes: half the time the object's segment, half the time its bounding box, as the paper trains.
Worker processes open the pictures, or read the cache, ahead of the step that needs them.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..data.manifest import ManifestError
from ..data.masks import VARIANTS
from ..errors import CatError
from .encoding import Sample, stack
from .mixture import Mixture, mix
from .objectives import Batch
from .settings import TrainingError
from .stores import SampleStore, chance_of

GRACE = 10  # seconds that a worker goes on for after it was told to end
TIMESTEPS = 1000  # of Stable Diffusion's noise schedule
# Share of samples that lose text and visual prompt together, for classifier-free guidance.
DROPPED = 0.1
MOST_WORKERS = 16  # of a process, where nobody says how many

_SHARED = (
    "cannot get shared memory for them. Give fewer --dataloader-num-workers, or more shared memory "
    "to the container; the same command goes on from the newest checkpoint"
)

Request = tuple[int, range]  # a step, and positions in its global batch
BatchSource = Callable[[int, range], Batch]


class Prepared(NamedTuple):
    """What a worker hands over: the samples of a request, before frozen networks and noise."""

    indices: list[int]  # of their records
    inputs: Batch  # what the store's samples hold, stacked
    unusable: dict[int, str]  # records that were found to be so meanwhile -> why


class PreparedSamples(Dataset):
    """(step, positions in the global batch) -> prepared samples, in whatever process.

    Every sample of the whole run has a number; its record, mask and noise follow from that number
    and the seed. A record that cannot be used is replaced by the next one.
    """

    def __init__(
        self,
        store: SampleStore,
        batch_size: int,
        seed: int,
        mixture: Mixture | None = None,
    ):
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.mixture = mixture or Mixture([len(store)], seed)

    @torch.no_grad()
    def __getitem__(self, request: Request) -> Prepared | CatError:
        """Prepare samples; an error that says what to do is returned, to be raised elsewhere."""
        step, positions = request
        known = set(self.store.unusable)
        indices: list[int] = []
        samples: list[Sample] = []
        try:
            for position in positions:
                number = step * self.batch_size + position
                variant = draw_variant(self.generator(number))
                index, sample = self._usable(number, variant)
                indices.append(index)
                samples.append(sample)
        except CatError as error:
            return error
        unusable = {}
        for index, reason in self.store.unusable.items():
            if index not in known:
                unusable[index] = reason
        inputs = stack(samples)
        if get_worker_info() is not None:
            try:
                for value in inputs.values():
                    value.share_memory_()  # here, where what goes wrong can be told
            except RuntimeError as error:
                return TrainingError(f"A process that prepares samples {_SHARED} ({error}).")
        return Prepared(indices, inputs, unusable)

    def generator(self, number: int) -> torch.Generator:
        """The chance of a sample of the run."""
        return torch.Generator().manual_seed(mix(self.seed, number))

    def _usable(self, number: int, variant: str) -> tuple[int, Sample]:
        """The record of a sample's number, or the next one that can be used, and its sample."""
        chance = chance_of(f"{self.seed} sample {number}")
        for attempt in range(self.mixture.attempts(number)):
            index = self.mixture.record(number, attempt)
            sample = self.store.sample(index, variant, chance)
            if sample is not None:
                return index, sample
        raise ManifestError("Not one record of the manifest can be used; see the report.")


class Batches:
    """(step, positions in the global batch) -> batch; the same on every machine, process and run.

    A batch depends on its step, the seed and the records alone: not on the number of processes,
    nor on that of the workers, nor on which of them prepared it and when. So a run that was killed
    with workers at work goes on with the batches that it would have seen.

    Args:
        batch_size: of the global batch.
        empty_context: the empty text's context (1, L, T), for diffusion's dropped samples.
        workers: processes that prepare samples ahead, where the loop asks for batches in turn;
            0 prepares them when they are asked for.
        mixture: of several sources; None takes each record as often as any other.
    """

    def __init__(
        self,
        store: SampleStore,
        batch_size: int,
        seed: int,
        empty_context: torch.Tensor | None = None,
        workers: int = 0,
        mixture: Mixture | None = None,
    ):
        if not len(store):
            raise ManifestError(
                "There is nothing to train on: the manifest has no record of this split."
            )
        self.store = store
        self.batch_size = batch_size
        self.empty_context = empty_context
        self.workers = workers
        self.samples = PreparedSamples(store, batch_size, seed, mixture)

    def __call__(self, step: int, positions: range) -> Batch:
        request = (step, positions)
        return self.finished(request, self.samples[request], torch.device("cpu"))

    @torch.no_grad()
    def finished(
        self, request: Request, prepared: Prepared | CatError, device: torch.device
    ) -> Batch:
        """Run the frozen networks over prepared samples, and draw their noise.

        Raises what the worker met, and TrainingError for a sample that holds NaN or Inf.
        """
        if isinstance(prepared, CatError):
            raise prepared
        for index, reason in prepared.unusable.items():
            self.store.skip(index, reason)
        batch = self.store.batch(prepared.indices, prepared.inputs, device)
        self._check_finite(prepared.indices, batch)
        if self.empty_context is not None:
            noise = self._noise(request, batch["latent"].shape[1:])
            batch |= {key: value.to(device) for key, value in noise.items()}
            dropped = batch["dropped"].view(-1, 1, 1)
            empty = self.empty_context.to(device)
            batch["context"] = torch.where(dropped, empty, batch["context"])
        # Encoders may have run in inference mode, whose tensors autograd does not take.
        return {key: value.clone() for key, value in batch.items()}

    def _check_finite(self, indices: list[int], batch: Batch) -> None:
        """Raise TrainingError, which names a sample, if one holds NaN or Inf."""
        finite = [values.isfinite().flatten(1).all(1) for values in batch.values()]
        table = torch.stack(finite).tolist()  # all at once: a GPU waits for each answer
        for name, row in zip(batch, table, strict=True):
            if not all(row):
                index = indices[row.index(False)]
                raise TrainingError(
                    f"{name} of record {self.store.records[index].id} holds NaN or Inf. "
                    f"{self.store.remedy(index)} What was trained so far is not touched."
                )

    def _noise(self, request: Request, shape: torch.Size) -> Batch:
        """What the diffusion objective draws by chance, for each sample from its own generator."""
        step, positions = request
        noise = []
        timestep = []
        dropped = []
        for position in positions:
            generator = self.samples.generator(step * self.batch_size + position)
            draw_variant(generator)  # comes first in a sample's chance
            noise.append(torch.randn(shape, generator=generator))
            timestep.append(torch.randint(TIMESTEPS, (1,), generator=generator))
            dropped.append(torch.rand(1, generator=generator) < DROPPED)
        return {
            "noise": torch.stack(noise),
            "timestep": torch.cat(timestep),
            "dropped": torch.cat(dropped),
        }


class Stream:
    """Batches in the order of the requests, and how long was waited for them.

    Args:
        source: a function; where it is Batches with workers, they prepare samples ahead, in memory
            that a GPU copies from while it computes.
        device: where batches are wanted.
    """

    def __init__(self, source: BatchSource, requests: Iterable[Request], device: torch.device):
        self.waited = 0.0  # seconds for pictures, cache and, without a cache, frozen networks
        if isinstance(source, Batches) and source.workers:
            self.batches = _prepared_ahead(source, requests, device)
        else:
            self.batches = (source(*request) for request in requests)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        start = time.monotonic()
        batch = next(self.batches)
        self.waited += time.monotonic() - start
        return batch


def default_workers(processes: int = 1) -> int:
    """Worker processes for each of a machine's processes: its share of the cores but one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(min((cores or 1) // processes - 1, MOST_WORKERS), 1)


def draw_variant(generator: torch.Generator) -> str:
    """How a sample's hole is made of its object."""
    return VARIANTS[int(torch.randint(2, (1,), generator=generator))]


def loader(
    samples: PreparedSamples, requests: Iterable[Request], workers: int, pinned: bool = False
) -> DataLoader:
    """A DataLoader whose items are the prepared samples of the requests, in their order.

    Args:
        pinned: in memory that a GPU copies from while it computes.
    """
    return DataLoader(
        samples,
        sampler=requests,
        batch_size=None,  # a request is a batch
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        worker_init_fn=_start_worker,
    )


def _prepared_ahead(
    source: Batches, requests: Iterable[Request], device: torch.device
) -> Iterator[Batch]:
    """Batches whose samples worker processes prepare."""
    pinned = device.type == "cuda"
    prepared = iter(loader(source.samples, requests, source.workers, pinned))
    for request in requests:
        try:
            samples = next(prepared)
        except RuntimeError as error:
            raise TrainingError(
                f"A process that prepares samples has died ({error}). Shared memory or memory may "
                "be full (give fewer --dataloader-num-workers), or a picture crashes its decoder "
                "(--dataloader-num-workers 0 shows which). The same command goes on from the "
                "newest checkpoint."
            ) from error
        yield source.finished(request, samples, device)


def _as_it_is(prepared):
    return prepared


def _start_worker(number: int) -> None:
    """Leave signals to the main process, which ends its step first and needs samples for that.

    Terminals send theirs to all processes of a command, and so do the schedulers of clusters. Who
    means a worker alone gets his way too, a while later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows, which sends nobody SIGTERM
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(GRACE)
