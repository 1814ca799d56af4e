"""Which record a sample of the run is made of: from one source, or from several in shares."""

import hashlib
from collections.abc import Sequence

import torch

from ..data.manifest import ManifestError

ROUND = 1000  # samples in which the shares of the sources are kept exactly


class Mixture:
    """A sample's number in the run -> its record, by seed and number alone.

    Every epoch of a source has an order of its own, and no record comes twice in it. With several
    sources each 1,000 samples hold exactly their shares, in an order that is drawn by the seed.

    Args:
        lengths: records of each source, which follow one another in the store.
        weights: of the sources; None takes each record as often as any other.
    Raises:
        ManifestError: a source without records; weights that do not fit.
    """

    def __init__(self, lengths: Sequence[int], seed: int, weights: Sequence[float] | None = None):
        if weights is None:
            lengths = [sum(lengths)]
            weights = [1]
        else:
            _check(lengths, weights)
        self.seed = seed
        self.lengths = list(lengths)
        self.firsts = [sum(lengths[:source]) for source in range(len(lengths))]
        self.counts = _counts(weights)  # samples of each source in a round
        self.epochs = [-1] * len(lengths)  # that the orders are of
        self.orders = [torch.empty(0, dtype=torch.int64)] * len(lengths)
        self.round = -1
        self.sources = torch.empty(0)  # of each sample of that round
        self.earlier = torch.empty(0)  # samples of the same source before it in that round

    def record(self, number: int, attempt: int = 0) -> int:
        """The record of a sample; those after it in its source where attempts before failed."""
        source, draw = self._draw(number)
        epoch, place = divmod(draw + attempt, self.lengths[source])
        if self.epochs[source] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, -1 - epoch))
            self.orders[source] = torch.randperm(self.lengths[source], generator=generator)
            self.epochs[source] = epoch
        return self.firsts[source] + int(self.orders[source][place])

    def attempts(self, number: int) -> int:
        """How many records a sample may be made of."""
        source, _ = self._draw(number)
        return self.lengths[source]

    def _draw(self, number: int) -> tuple[int, int]:
        """The source of a sample, and which of the source's samples it is."""
        if len(self.lengths) == 1:
            return 0, number
        round, place = divmod(number, ROUND)
        if self.round != round:
            generator = torch.Generator().manual_seed(mix(self.seed, f"round {round}"))
            order = torch.randperm(ROUND, generator=generator)
            self.sources = torch.repeat_interleave(torch.tensor(self.counts))[order]
            one_hot = self.sources[:, None] == torch.arange(len(self.counts))
            before = one_hot.cumsum(0) - one_hot.long()
            self.earlier = before.gather(1, self.sources[:, None])[:, 0]
            self.round = round
        source = int(self.sources[place])
        return source, round * self.counts[source] + int(self.earlier[place])


def mix(seed: int, number: int | str) -> int:
    """A seed of 56 bits for one of a run's numbers, unlike those of its neighbours."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def _counts(weights: Sequence[float]) -> list[int]:
    """Shares of a round: rounded down, the largest remainders up."""
    exact = [ROUND * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: ROUND - sum(counts)]:
        counts[source] += 1
    return counts


def _check(lengths: Sequence[int], weights: Sequence[float]) -> None:
    if len(lengths) != len(weights):
        raise ManifestError(
            f"There are {len(weights)} weights for {len(lengths)} manifests. Give each one."
        )
    total = sum(weights)
    for number, (length, weight) in enumerate(zip(lengths, weights, strict=True), 1):
        if total <= 0 or not ROUND * weight / total >= 1:
            raise ManifestError(
                f"The weight of manifest {number} is {weight:g} of {total:g}, expected at "
                "least a thousandth. Raise it, or leave the manifest out."
            )
        if not length:
            raise ManifestError(
                f"There is nothing to train on in manifest {number}, which has no record of this "
                "split. Leave it out, or give another split."
            )
