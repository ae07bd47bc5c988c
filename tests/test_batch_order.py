"""The order of batches: every sample once, one shape per batch, the same number for every rank, another order each epoch."""

from collections import Counter
from itertools import chain, islice

import pytest

from latent_codec.latents.batch_order import BatchOrder

ONE_SHAPE = [[(0, 10)], [(0, 7)], [(0, 10)], [(0, 3)]]
BUCKETS = [[(0, 5), (1, 4)], [(1, 3), (2, 8)], [(0, 9)], [(2, 1), (0, 1), (1, 6)]]


def order(shards=ONE_SHAPE, **changes) -> BatchOrder:
    settings = {
        "batch_size": 4,
        "shuffle": True,
        "seed": 0,
        "buffer_size": 8,
        "drop_last": False,
        "rank": 0,
        "world_size": 1,
    }
    return BatchOrder(shards=shards, **settings | changes)


def batches(found: BatchOrder, epoch: int = 0) -> list[list[int]]:
    return [each.tolist() for each in found.batches(epoch)]


def shape_of(sample: int) -> int:
    return [shape for shard in BUCKETS for shape, count in shard for _ in range(count)][sample]


def test_unshuffled_batches_are_the_samples_in_order():
    assert batches(order(shuffle=False)) == [
        list(range(start, min(start + 4, 30))) for start in range(0, 30, 4)
    ]
    assert batches(order(shuffle=False, drop_last=True))[-1] == [24, 25, 26, 27]


@pytest.mark.parametrize("shards", [ONE_SHAPE, BUCKETS])
def test_every_sample_is_in_one_batch_of_its_shape_and_every_epoch_has_another_order(shards):
    first, second = (batches(order(shards), epoch) for epoch in (0, 1))
    total = sum(count for shard in shards for _, count in shard)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(total))
    assert first != second and first == batches(order(shards))
    assert first != batches(order(shards, seed=1))
    if shards is BUCKETS:
        assert all(len({shape_of(sample) for sample in batch}) == 1 for batch in first)
    assert len(first) == order(shards).num_batches(0)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shards", [ONE_SHAPE, BUCKETS])
def test_ranks_share_the_samples_and_have_as_many_batches(shards, drop_last):
    ranks = [order(shards, rank=rank, world_size=3, drop_last=drop_last) for rank in range(3)]
    for epoch in range(4):
        found = [batches(rank, epoch) for rank in ranks]
        assert len({len(each) for each in found}) == 1
        assert len(found[0]) == ranks[0].num_batches(epoch)
        counts = Counter(sample for rank in found for batch in rank for sample in batch)
        assert max(counts.values()) == 1
        if shards is ONE_SHAPE and not drop_last:
            assert len(counts) == 30


def test_shuffling_stays_near_in_the_data_so_that_few_shards_are_open():
    shards = [[(0, 100)]] * 20
    found = order(shards, buffer_size=200, batch_size=10)
    for block in range(10):
        some = [sample for batch in islice(found.batches(0), block * 20, block * 20 + 20) for sample in batch]
        assert len({sample // 100 for sample in some}) <= 3
    assert len({sample // 100 for sample in next(found.batches(0))}) > 1


def test_no_samples_are_no_batches():
    assert batches(order([])) == [] and order([]).num_batches(0) == 0


def test_the_runs_of_many_shards_take_no_time():
    shards = [[(0, 5000), (1, 5000)]] * 20_000  # 2 * 10^8 samples
    found = order(shards, batch_size=32, buffer_size=4096, world_size=8, rank=7)
    assert found.num_batches(0) == 2 * 10**8 // 8 // 32
    assert len(next(found.batches(0))) == 32
