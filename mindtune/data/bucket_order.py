"""The order of the batches of a run, whose samples all belong to one bucket and so have the same size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mindtune.rng import SampleStream, generator


class BucketOrder:
    """The samples of every batch, all of one bucket, as a pure function of the batch number. Thread-safe.

    Each bucket has an endless shuffled stream of its own (a `SampleStream`, named by `purpose` and the bucket), which
    is cut into full batches. One pass uses each of the N samples `repeats` times. Pass e takes, from a bucket with n
    uses per pass and a batch size of B, the batches floor(e n / B) up to floor((e + 1) n / B) of its stream. So no
    sample is dropped, every bucket is used in proportion, and a batch may reach into its bucket's next pass. The
    order of the buckets is shuffled in every pass; with a single bucket the order of the samples is that of the
    stream, whatever the batch size.
    """

    def __init__(
        self, seed: int, buckets_of_samples: np.ndarray, batch_size: int, purpose: str = "bucket {}", repeats: int = 1
    ) -> None:
        if not len(buckets_of_samples) or batch_size < 1:
            raise ValueError(
                f"an order needs samples and a batch size of 1 or more, got {len(buckets_of_samples)} and {batch_size}"
            )
        self.seed = seed
        self.batch_size = batch_size
        self.repeats = repeats
        self.epoch_length = len(buckets_of_samples) * repeats
        self.buckets = np.unique(buckets_of_samples).tolist()
        self.members = [np.flatnonzero(buckets_of_samples == bucket) for bucket in self.buckets]
        self.streams = [
            SampleStream(seed, purpose.format(bucket), len(members), repeats)
            for bucket, members in zip(self.buckets, self.members)
        ]

    def at(self, batch: int) -> tuple[int, list[tuple[int, int]]]:
        """The bucket of a batch, and its samples as (sample id, number of earlier uses of that sample)."""
        which, first = self.place(batch)
        return self.buckets[which], self.uses(which, first)

    def place(self, batch: int) -> tuple[int, int]:
        """The index in `buckets` of a batch's bucket, and the position of its first sample in that bucket's stream."""
        # A lower bound of the pass: the passes before it have at most `batch` batches.
        epoch = batch * self.batch_size // self.epoch_length
        while sum(self._batches_before(epoch + 1)) <= batch:
            epoch += 1
        before = self._batches_before(epoch)
        counts = tuple(end - start for start, end in zip(before, self._batches_before(epoch + 1)))
        order = _bucket_order(self.seed, epoch, counts)
        offset = batch - sum(before)
        which = int(order[offset])
        earlier_in_this_pass = int(np.count_nonzero(order[:offset] == which))
        return which, (before[which] + earlier_in_this_pass) * self.batch_size

    def uses(self, which: int, first: int) -> list[tuple[int, int]]:
        """(sample id, number of earlier uses) of each sample in the batch at `place`."""
        found = (self.streams[which].at(position) for position in range(first, first + self.batch_size))
        return [(int(self.members[which][sample]), use) for sample, use in found]

    def _batches_before(self, epoch: int) -> list[int]:
        """The number of batches of each bucket before pass number `epoch`."""
        return [epoch * len(members) * self.repeats // self.batch_size for members in self.members]


@lru_cache(maxsize=8)
def _bucket_order(seed: int, epoch: int, counts: tuple[int, ...]) -> np.ndarray:
    """The bucket index of every batch of one pass. Each index occurs as often as `counts` says."""
    return generator(seed, "bucket order", epoch).permutation(np.repeat(np.arange(len(counts)), counts))
