"""Aspect-ratio buckets: the shapes that pictures are cropped to, and batches of one shape each."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Optional, Union

import numpy as np

from mindtune.cli import UserError
from mindtune.rng import SampleStream, generator


def parse_buckets(text: str) -> list[tuple[int, int]]:
    """ "672,1568;688,1504" to [(height, width), ...] in pixels. Raises UserError for sides that 16 does not divide, and for duplicates."""
    buckets = []
    for part in filter(str.strip, text.split(";")):
        try:
            height, width = (int(side) for side in part.split(","))
        except ValueError:
            raise UserError(
                f"--aspect_ratio_buckets: {part.strip()!r} is not height,width. Write them like 672,1568;688,1504."
            ) from None
        if height % 16 or width % 16 or height < 16 or width < 16:
            raise UserError(
                f"--aspect_ratio_buckets: {height},{width}: both sides must be multiples of 16 and at least 16."
            )
        if (height, width) in buckets:
            raise UserError(f"--aspect_ratio_buckets: {height},{width} is there twice. Name every bucket once.")
        buckets.append((height, width))
    if not buckets:
        raise UserError(f"--aspect_ratio_buckets {text!r}: no bucket. Write them as height,width;height,width.")
    return buckets


def crop_sizes(buckets: Optional[str], resolution: int) -> list[tuple[int, int]]:
    """(height, width) of everything that a run crops to: its buckets, or without any the square of `resolution`."""
    return parse_buckets(buckets) if buckets else [(resolution, resolution)]


def min_size(sizes: list[tuple[int, int]]) -> Union[int, list[tuple[int, int]]]:
    """What a preflight asks of pictures: one square by its side, which messages call --resolution, or the buckets."""
    return sizes[0][0] if len(sizes) == 1 and sizes[0][0] == sizes[0][1] else sizes


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> int:
    """The number of the bucket (height, width) whose shape is closest to `size` (width, height): |log of the ratio of ratios|.

    Computed in exact fractions, so that two buckets equally far tie, and the first one wins.
    """

    def distance(bucket):
        mine, its = size[0] * bucket[0], size[1] * bucket[1]
        return Fraction(max(mine, its), min(mine, its))

    return min(range(len(buckets)), key=lambda number: distance(buckets[number]))


def bucket_ids(samples: Iterable, buckets: list[tuple[int, int]]) -> np.ndarray:
    """The nearest bucket of every `data.Sample`, int [N]. Pictures are opened only if there is a choice."""
    return np.array(
        [nearest_bucket(sample.open().size, buckets) if len(buckets) > 1 else 0 for sample in samples], dtype=np.int64
    )


class BucketOrder:
    """Batches of pictures of one shape, a pure function of the batch number from the start of the run, safe from threads.

    Every bucket is an endless shuffled stream of its own (`SampleStream`, named by `purpose` and the bucket), cut into full batches. A
    pass over the N samples, each `repeats` times, takes of a bucket with n uses the batches floor(e n / B) up to floor((e + 1) n / B) of
    that stream: nothing is dropped, nothing starves, and a batch may reach into the bucket's next pass. Which bucket is next is shuffled
    in every pass; within a bucket the order is the stream's, so one bucket alone gives the stream itself, whatever the batch size.
    """

    def __init__(
        self, seed: int, buckets_of_samples: np.ndarray, batch_size: int, purpose: str = "bucket {}", repeats: int = 1
    ) -> None:
        if not len(buckets_of_samples) or batch_size < 1:
            raise ValueError(
                f"an order needs samples and a batch size of 1 or more, got {len(buckets_of_samples)} and {batch_size}"
            )
        self.seed, self.batch_size, self.repeats = seed, batch_size, repeats
        self.epoch_length = len(buckets_of_samples) * repeats
        self.buckets = np.unique(buckets_of_samples).tolist()
        self.members = [np.flatnonzero(buckets_of_samples == bucket) for bucket in self.buckets]
        self.streams = [
            SampleStream(seed, purpose.format(k), len(ids), repeats) for k, ids in zip(self.buckets, self.members)
        ]

    def at(self, batch: int) -> tuple[int, list[tuple[int, int]]]:
        """The bucket of a batch and its (sample id, how often that sample was used before)."""
        which, first = self.place(batch)
        return self.buckets[which], self.uses(which, first)

    def place(self, batch: int) -> tuple[int, int]:
        """Which of `buckets` a batch is of, and the place of its first sample in that bucket's stream."""
        number = (
            batch * self.batch_size // self.epoch_length
        )  # not too late: the passes before it have at most `batch` batches
        while sum(self._before(number + 1)) <= batch:
            number += 1
        before = self._before(number)
        turns = _turns(self.seed, number, tuple(after - b for after, b in zip(self._before(number + 1), before)))
        offset = batch - sum(before)
        which = int(turns[offset])
        return which, (before[which] + int(np.count_nonzero(turns[:offset] == which))) * self.batch_size

    def uses(self, which: int, first: int) -> list[tuple[int, int]]:
        """(sample id, how often that sample was used before) of a batch at its `place`."""
        found = (self.streams[which].at(position) for position in range(first, first + self.batch_size))
        return [(int(self.members[which][sample]), use) for sample, use in found]

    def _before(self, number: int) -> list[int]:
        """How many batches of each bucket come before pass `number`."""
        return [number * len(ids) * self.repeats // self.batch_size for ids in self.members]


@lru_cache(maxsize=8)
def _turns(seed: int, number: int, counts: tuple[int, ...]) -> np.ndarray:
    """Which bucket the batches of one pass belong to: each as often as it has batches."""
    return generator(seed, "bucket order", number).permutation(np.repeat(np.arange(len(counts)), counts))
