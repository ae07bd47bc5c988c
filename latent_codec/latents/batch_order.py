"""The order in which a trainer sees the samples of a data set: a pure function of seed, epoch and rank.

shards, in random order --equal ranges--> a rank's samples --blocks, shuffled--> by shape --> batches 0, 1, 2 ...

Nothing depends on how many workers read, or on what was read before, so that a training that starts again at batch N
sees what it would have seen. Shards are read about one after another, as disks and networks like it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Runs = Sequence[tuple[int, int]]
"""Of a shard: (number of the shape, how many consecutive samples have it)."""


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which samples are in which batch.

    All samples of a batch have one shape, and every rank has as many batches as the others, so that none waits for
    one that will not arrive; less than a batch of each shape and rank may be left out for it, others in each epoch.
    """

    shards: Sequence[Runs]
    """In the order of the data set; samples are numbered through all of them."""
    batch_size: int
    shuffle: bool
    seed: int
    buffer_size: int
    """Samples that are shuffled together, of shards that are neighbors in the epoch's order."""
    drop_last: bool
    """Leave out the last batch of each shape where it is not full."""
    rank: int
    world_size: int

    def num_batches(self, epoch: int) -> int:
        """Of each rank in an epoch."""
        if self.world_size == 1:
            return self._num_batches(self._counts(epoch)[0])
        return min(map(self._num_batches, self._counts(epoch)))

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The numbers of the samples of each batch of this rank, in the data set."""
        count = self.num_batches(epoch)
        for batch, _ in zip(self._all_batches(epoch), range(count)):
            yield batch

    def _num_batches(self, counts: np.ndarray) -> int:
        return int((counts // self.batch_size if self.drop_last else -(-counts // self.batch_size)).sum())

    def _all_batches(self, epoch: int) -> Iterator[np.ndarray]:
        order = self._shard_order(epoch)
        lengths = self._lengths[order]
        ends = lengths.cumsum()
        starts = (self._lengths.cumsum() - self._lengths)[order]
        shapes = _Shapes(self.shards)
        first, last = self._range(int(ends[-1]) if len(ends) else 0)
        waiting: dict[int, np.ndarray] = {}
        for block in range(first, last, self.buffer_size):
            places = np.arange(block, min(block + self.buffer_size, last))
            rng = np.random.default_rng([self.seed, epoch, self.rank, block])
            if self.shuffle:
                rng.shuffle(places)
            shard = np.searchsorted(ends, places, side="right")
            samples = starts[shard] + places - (ends - lengths)[shard]
            full = []
            for shape, some in shapes.split(samples):
                some = np.concatenate((waiting.pop(shape, some[:0]), some))
                cut = len(some) // self.batch_size * self.batch_size
                full += np.split(some[:cut], cut // self.batch_size) if cut else []
                if cut < len(some):
                    waiting[shape] = some[cut:]
            for number in rng.permutation(len(full)) if self.shuffle else range(len(full)):
                yield full[number]
        if not self.drop_last:
            yield from (waiting[shape] for shape in sorted(waiting))

    def _shard_order(self, epoch: int) -> np.ndarray:
        """The shards' numbers, in the order of an epoch."""
        order = np.arange(len(self.shards))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([sum(count for _, count in runs) for runs in self.shards], np.int64)

    def _range(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """Where the samples of a rank begin and end in the epoch: as many for every rank."""
        rank = self.rank if rank is None else rank
        share = total // self.world_size
        return rank * share, (rank + 1) * share

    def _counts(self, epoch: int) -> list[np.ndarray]:
        """How many samples of each shape each rank has."""
        runs = np.array(
            [run for shard in self._shard_order(epoch) for run in self.shards[shard]], np.int64
        ).reshape(-1, 2)
        ends = runs[:, 1].cumsum()
        num_shapes = int(runs[:, 0].max(initial=-1)) + 1
        found = []
        for rank in range(self.world_size):
            first, last = self._range(int(runs[:, 1].sum()), rank)
            inside = np.clip(ends, first, last) - np.clip(ends - runs[:, 1], first, last)
            found.append(np.bincount(runs[:, 0], inside, num_shapes).astype(np.int64))
        return found


class _Shapes:
    """The number of each sample's shape."""

    def __init__(self, shards: Sequence[Runs]):
        runs = np.array([run for shard in shards for run in shard], np.int64).reshape(-1, 2)
        self._numbers, self._ends = runs[:, 0], runs[:, 1].cumsum()
        self._is_one = len(set(self._numbers.tolist())) < 2

    def split(self, samples: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """The samples of each shape, in their order."""
        if self._is_one:
            return [(0, samples)]
        shapes = self._numbers[np.searchsorted(self._ends, samples, side="right")]
        return [(int(shape), samples[shapes == shape]) for shape in np.unique(shapes)]
