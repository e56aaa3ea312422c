"""The order of the batches of several buckets."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mindtune.data.bucket_order import BucketOrder
from mindtune.rng import SampleStream

UNEVEN = np.array([2, 0, 0, 4, 0, 2, 0, 4, 0, 0, 2, 0, 4, 4, 4, 4, 0])  # 8, 3 and 6 samples of the buckets 0, 2 and 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 20, 50])
def test_batches_follow_the_streams_of_their_buckets(size):
    """A bucket's batches follow its stream in order. After e passes bucket k has given floor(e n_k / B) batches."""
    order = BucketOrder(7, UNEVEN, size)
    members = {k: np.flatnonzero(k == UNEVEN) for k in (0, 2, 4)}
    streams = {k: SampleStream(7, f"bucket {k}", len(ids)) for k, ids in members.items()}
    given = dict.fromkeys(members, 0)
    for number in range(1, 12):
        for batch in range(sum(given.values()), sum(number * len(ids) // size for ids in members.values())):
            bucket, uses = order.at(batch)
            positions = range(given[bucket] * size, (given[bucket] + 1) * size)
            assert uses == [(members[bucket][sample], use) for sample, use in map(streams[bucket].at, positions)]
            given[bucket] += 1
        assert given == {k: number * len(ids) // size for k, ids in members.items()}
    assert order.epoch_length == 17


def test_a_batch_does_not_depend_on_earlier_calls():
    forward = [BucketOrder(1, UNEVEN, 4).at(batch) for batch in range(60)]
    order = BucketOrder(1, UNEVEN, 4)
    assert [order.at(batch) for batch in reversed(range(60))] == forward[::-1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(order.at, range(60))) == forward
    assert [BucketOrder(2, UNEVEN, 4).at(batch) for batch in range(60)] != forward


def test_buckets_alternate_at_random():
    """The order of the buckets is mixed, and differs from pass to pass."""
    order = BucketOrder(0, np.repeat([0, 1], 50), 1)
    passes = [[order.at(number * 100 + batch)[0] for batch in range(100)] for number in range(2)]
    assert passes[0] != passes[1]
    assert all(sum(turns) == 50 and 25 < np.count_nonzero(np.diff(turns)) < 75 for turns in passes)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_a_single_bucket_follows_its_stream_at_every_batch_size(size):
    order, stream = BucketOrder(3, np.zeros(7, int), size), SampleStream(3, "bucket 0", 7)
    for batch in range(30):
        assert order.at(batch) == (0, [stream.at(position) for position in range(batch * size, (batch + 1) * size)])


def test_an_order_without_samples_is_refused():
    with pytest.raises(ValueError, match="got 0 and 2"):
        BucketOrder(0, np.array([], int), 2)
    with pytest.raises(ValueError, match="got 3 and 0"):
        BucketOrder(0, np.zeros(3, int), 0)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_repeats_are_uses_in_one_pass(size):
    """As in `SampleStream`. A pass has all uses of both buckets; `place` is the position of a batch in its stream."""
    numbers = np.array([0, 1, 0, 0, 1])
    order = BucketOrder(5, numbers, size, "instance {}", repeats=4)
    assert order.epoch_length == 20
    streams = [SampleStream(5, f"instance {k}", count, 4) for k, count in enumerate((3, 2))]
    starts = [0, 0]
    for batch in range(40):
        which, first = order.place(batch)
        assert first == starts[which]
        starts[which] += size
        ids = np.flatnonzero(numbers == which)
        assert order.at(batch) == (
            which,
            [(int(ids[i]), use) for i, use in map(streams[which].at, range(first, first + size))],
        )
    assert abs(starts[0] - 1.5 * starts[1]) < 2.5 * size
