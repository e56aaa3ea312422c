"""Making batches ahead of the training step."""

import threading
import time

import pytest

from mindtune.data.order import prefetch


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetch_keeps_the_order(workers):
    """Although the first ones take longest."""

    def slow(position):
        time.sleep(0.02 if position < 8 and position % 3 == 0 else 0)
        return position * position

    assert list(prefetch(slow, range(5, 25), workers)) == [p * p for p in range(5, 25)]


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetch_without_positions(workers):
    assert list(prefetch(lambda p: p, range(0), workers)) == []


@pytest.mark.parametrize("workers", [0, 3])
def test_prefetch_raises_errors_at_their_position(workers):
    def make(position):
        if position == 4:
            raise OSError("file 4 has gone")
        return position

    ahead, seen = prefetch(make, range(10), workers), []
    with pytest.raises(OSError, match="file 4"):
        for value in ahead:
            seen.append(value)
    assert seen == [0, 1, 2, 3]


def test_prefetch_uses_threads_and_stays_a_few_items_ahead():
    made, threads = [], set()

    def make(position):
        threads.add(threading.get_ident())
        made.append(position)
        return position

    ahead = prefetch(make, range(1000), 3)
    assert [next(ahead) for _ in range(4)] == [0, 1, 2, 3]
    time.sleep(0.05)
    assert len(made) <= 4 + 3 + 2 and threading.get_ident() not in threads
    ahead.close()


def test_prefetch_can_be_closed_early():
    """As in a run that is stopped: no thread continues reading."""
    made = []
    ahead = prefetch(lambda p: made.append(p), range(1000), 3)
    next(ahead)
    ahead.close()
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count < 10
