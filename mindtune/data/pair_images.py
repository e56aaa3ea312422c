"""The images of all pairs of a run, for the encoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mindtune.data.image_sample import Sample
from mindtune.data.pairs import Pair


class PairImages:
    """Every (image, size, flip) of a run, read anew in each iteration, so that memory does not grow with the set."""

    def __init__(self, data: Any, random_flip: bool, held_out: bool) -> None:
        self.data = data
        self.flips = [False, True] if random_flip else [False]
        self.held_out = held_out

    def __len__(self) -> int:
        data = self.data
        train = 0 if self.held_out else len(data.train) * len(self.flips)
        count = train + len(data.held_out)
        if data.images_per_sample == 2:
            count += 0 if self.held_out else data.train.condition_count * len(self.flips)
            count += sum(pair.condition is not None for pair in data.held_out)
        return count

    def __iter__(self) -> Iterator[tuple[Sample, tuple[int, int], bool]]:
        data = self.data
        for pair, bucket in zip(data.held_out, data.held_out_bucket_ids):
            yield from self._images(pair, data.sizes[bucket], [False])
        for pair, bucket in zip(data.train, data.bucket_ids) if not self.held_out else ():
            yield from self._images(pair, data.sizes[bucket], self.flips)

    def _images(
        self, pair: Pair, size: tuple[int, int], flips: list[bool]
    ) -> Iterator[tuple[Sample, tuple[int, int], bool]]:
        images = self.data.encoded_images(pair, size)
        for flip in flips:
            for sample, own_size in images:
                yield sample, own_size, flip
