"""The pairs that a run trains on, and those held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Callable, Optional, Union

from mindtune.data.buckets import BucketOrder, bucket_ids, min_size
from mindtune.data.columns import Source
from mindtune.data.order import prefetch, split
from mindtune.data.pair_checks import preflight_pairs, require_usable
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import Pair, Pairs, load_pairs
from mindtune.distributed import ranks


class PairData:
    """The pairs to train on and those kept out, the bucket of each, and which uses of which pairs make up batch number k."""

    def __init__(
        self,
        train: Union[Pairs, PairStream],
        held_out: list[Pair],
        buckets: list[tuple[int, int]],
        seed: int,
        batch_size: int,
    ):
        self.train, self.held_out, self.buckets, self.batch_size = train, held_out, buckets, batch_size
        self.streaming, self.background = isinstance(train, PairStream), train.background
        # An epoch of a stream is not known: the whole run counts as one.
        self.epoch_length = train.count if self.streaming else len(train)
        self.numbers = None if self.streaming else bucket_ids((pair.image for pair in train), buckets)
        self.held_out_numbers = bucket_ids((pair.image for pair in held_out), buckets)
        self.order = None if self.streaming else BucketOrder(seed, self.numbers, batch_size)

    def iterate(
        self, first: int, last: int, make: Callable[[list, tuple[int, int]], Any], threads: int
    ) -> Iterator[Any]:
        """make(uses, size) of this worker's share of the batches from number `first` to before `last`, made ahead by `threads`.

        A use is (pair, sample id, how often it was used before); of a stream its place stands for the id. `size` is (height, width).
        """
        if self.streaming:
            stream = enumerate(self.train.from_position(first * self.batch_size), first * self.batch_size)
            batches = (
                [(pair, place, 0) for place, pair in islice(stream, self.batch_size)] for _ in range(first, last)
            )
            share = islice(batches, ranks.rank(), None, ranks.world_size())
            return prefetch(lambda uses: make(uses, self.buckets[0]), share, threads)

        def at(number: int) -> Any:
            bucket, uses = self.order.at(number)
            return make([(self.train[sample_id], sample_id, use) for sample_id, use in uses], self.buckets[bucket])

        return prefetch(at, ranks.shard(range(first, last)), threads)

    def digests(self) -> Iterator[str]:
        """What tells one data set from another: the contents of every pair. Of a stream nothing: that would cost as much as the run."""
        return (
            iter(())
            if self.streaming
            else (pair.image.digest + pair.condition.digest + pair.caption for pair in self.train)
        )


def load_data(
    source: Source,
    buckets: list[tuple[int, int]],
    seed: int,
    batch_size: int,
    max_samples: Optional[int],
    held_out_share: float,
    skip_bad: bool,
    threads: int,
) -> PairData:
    """The pairs of a source, all of them checked, split by `seed`. Raises UserError listing every problem at once."""
    found = load_pairs(source)
    if max_samples:
        found = found.select(range(min(max_samples, len(found))))
    found = preflight_pairs(found, min_size(buckets), f"{source.flag} {source.name}", skip_bad, threads)
    kept, kept_out = split(len(found), held_out_share, seed)
    return PairData(found.select(kept), list(found.select(kept_out)), buckets, seed, batch_size)


@dataclass
class PairCaptions:
    """Every caption that a ControlNet run uses, made anew at each iteration: of its pairs, the held-out ones, and `more`."""

    data: PairData
    more: list[str]

    def __iter__(self):
        yield from self.more
        for group in (self.data.held_out, self.data.train):
            for pair in group:
                yield pair.caption


@dataclass
class PairImages:
    """Every picture (with `conditions`: and condition) of a ControlNet run with its size and flip, made anew at each iteration."""

    data: PairData
    random_flip: bool
    conditions: bool = True

    def __iter__(self):
        data = self.data
        kept_out = data.held_out, data.held_out_numbers, [False]
        train = (
            data.train,
            itertools.repeat(0) if data.streaming else data.numbers,
            [False, True] if self.random_flip else [False],
        )
        for group, numbers, flips in (kept_out, train):
            for pair, number in zip(group, numbers):
                if group is data.train and data.streaming:
                    require_usable(pair, data.buckets)
                for flip in flips:
                    for sample in (pair.image, pair.condition) if self.conditions else (pair.image,):
                        yield sample, data.buckets[number], flip
