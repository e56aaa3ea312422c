"""The pairs of a ControlNet run, and its batches by their numbers. `image_data` does the same for LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Optional, Union

from mindtune.data.buckets import BucketOrder, bucket_ids, crop_sizes, min_size
from mindtune.data.columns import Source
from mindtune.data.draws import HeldOutDraws, TrainingDraws
from mindtune.data.image_facts import ImageFacts
from mindtune.data.image_sample import Sample
from mindtune.data.order import prefetch, split
from mindtune.data.pair_checks import preflight_pairs, require_usable
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import Pair, Pairs, load_pairs
from mindtune.distributed import ranks
from mindtune.files import text_digest


class Settings(NamedTuple):
    """How a run reads its pairs. The fields have the names of the flags."""

    train_batch_size: int
    resolution: int
    aspect_ratio_buckets: Optional[str] = None
    max_train_samples: Optional[int] = None
    validation_split: float = 0.0
    skip_bad_images: bool = False
    dataloader_num_workers: int = 1
    cache_latents: bool = False
    streaming: bool = False
    shuffle_buffer_size: int = 1000
    max_train_steps: Optional[int] = None
    gradient_accumulation_steps: int = 1


class PairUse(NamedTuple):
    """One use of a pair: a script makes a row of a batch from it. `size` is the crop's (height, width) in pixels."""

    sample: Pair
    size: tuple[int, int]
    draws: Union[TrainingDraws, HeldOutDraws]


class PairData:
    """Training pairs and held-out pairs, and which of them make up the batch of a given number.

    With `check_pairs` every pair of a stream is checked when it is used. Without it `PairImages` checks them, when the
    encoder stage reads the stream.
    """

    def __init__(
        self,
        train: Union[Pairs, PairStream],
        held_out: list[Pair],
        *,
        sizes: list[tuple[int, int]],
        seed: int,
        batch_size: int,
        check_pairs: bool = False,
    ) -> None:
        self.train = train
        self.held_out = held_out
        self.sizes = sizes
        self.seed = seed
        self.batch_size = batch_size
        self.streaming = isinstance(train, PairStream)
        self.check_pairs = check_pairs and self.streaming
        self.background = train.background
        # The length of a stream is not known, so an epoch is the whole run.
        self.epoch_length = train.count if self.streaming else len(train)
        self.bucket_ids = None if self.streaming else bucket_ids((pair.image for pair in train), sizes)
        self.held_out_bucket_ids = bucket_ids((pair.image for pair in held_out), sizes)
        self.order = None if self.streaming else BucketOrder(seed, self.bucket_ids, batch_size)

    def iterate(self, first: int, last: int, make_batch: Callable[[list[PairUse]], Any], threads: int) -> Iterator[Any]:
        """This rank's shard of the batches `first` to `last` - 1 of all ranks, prepared in advance by `threads`."""
        if self.streaming:
            batches = itertools.islice(self._stream(first, last), ranks.rank(), None, ranks.world_size())
            return prefetch(lambda uses: make_batch(self._checked(uses)), batches, threads)
        return prefetch(lambda number: make_batch(self.uses(number)), ranks.shard(range(first, last)), threads)

    def uses(self, number: int) -> list[PairUse]:
        """The pairs of batch `number`."""
        bucket, uses = self.order.at(number)
        size = self.sizes[bucket]
        return [PairUse(self.train[i], size, TrainingDraws(self.seed, "pair", i, use)) for i, use in uses]

    def held_out_use(self, sample_id: int, timestep: int) -> PairUse:
        """A held-out pair at a timestep."""
        size = self.sizes[self.held_out_bucket_ids[sample_id]]
        return PairUse(self.held_out[sample_id], size, HeldOutDraws(self.seed, sample_id, timestep))

    def captions(self, more: list[str]) -> PairCaptions:
        """Every caption of the run, and `more`."""
        return PairCaptions(self, more)

    def images(self, random_flip: bool, conditions: bool) -> PairImages:
        """Every (image, size, flip) of the run, for `EncoderStage.encode`; with `conditions` condition images too."""
        return PairImages(self, random_flip, conditions)

    def fingerprint(self) -> str:
        """A hash of the contents of all training pairs. All streams have the same: they are not read in advance."""
        pairs = () if self.streaming else self.train
        return text_digest(pair.image.digest + pair.condition.digest + pair.caption for pair in pairs)

    def facts(self) -> dict[str, Any]:
        """What run.json says about the data."""
        return {
            "samples": self.epoch_length,
            "held_out": [pair.image.name for pair in self.held_out],
            "condition_background": self.background,
        }

    def _stream(self, first: int, last: int) -> Iterator[list[PairUse]]:
        """The batches `first` to `last` - 1 of a stream. The id of a pair is its position in the stream."""
        start = first * self.batch_size
        pairs = enumerate(self.train.from_position(start), start)
        for _ in range(first, last):
            yield [
                PairUse(pair, self.sizes[0], TrainingDraws(self.seed, "pair", position, 0))
                for position, pair in itertools.islice(pairs, self.batch_size)
            ]

    def _checked(self, uses: list[PairUse]) -> list[PairUse]:
        for use in uses if self.check_pairs else ():
            require_usable(use.sample, min_size(self.sizes))
        return uses


def load(source: Source, settings: Settings, seed: int, facts: ImageFacts) -> PairData:
    """Loads the pairs of a source, checks them, and splits them by `seed`. A stream is checked as it is read.

    An image that `facts` knows is not decoded again. Raises UserError that lists all problems.
    """
    sizes = crop_sizes(settings.aspect_ratio_buckets, settings.resolution)
    if settings.streaming:
        samples_per_update = settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size()
        stream = PairStream(source, seed, settings.shuffle_buffer_size, settings.max_train_steps * samples_per_update)
        return PairData(
            stream,
            [],
            sizes=sizes,
            seed=seed,
            batch_size=settings.train_batch_size,
            check_pairs=not settings.cache_latents,
        )
    pairs = load_pairs(source)
    if settings.max_train_samples:
        pairs = pairs.select(range(min(settings.max_train_samples, len(pairs))))
    pairs = preflight_pairs(
        pairs,
        min_size(sizes),
        f"{source.flag} {source.name}",
        settings.skip_bad_images,
        settings.dataloader_num_workers,
        facts,
    )
    train, held_out = split(len(pairs), settings.validation_split, seed)
    return PairData(
        pairs.select(train),
        list(pairs.select(held_out)),
        sizes=sizes,
        seed=seed,
        batch_size=settings.train_batch_size,
    )


@dataclass
class PairCaptions:
    """Every caption of a run, read anew in each iteration, so that memory does not grow with the data set."""

    data: PairData
    more: list[str]

    def __iter__(self) -> Iterator[str]:
        yield from self.more
        for pairs in (self.data.held_out, self.data.train):
            for pair in pairs:
                yield pair.caption


@dataclass
class PairImages:
    """Every (image, size, flip) of a run, read anew in each iteration; with `conditions` the condition images too."""

    data: PairData
    random_flip: bool
    conditions: bool

    def __iter__(self) -> Iterator[tuple[Sample, tuple[int, int], bool]]:
        data = self.data
        for pair, bucket in zip(data.held_out, data.held_out_bucket_ids):
            yield from self._images(pair, data.sizes[bucket], [False])
        train_ids = itertools.repeat(0) if data.streaming else data.bucket_ids
        for pair, bucket in zip(data.train, train_ids):
            if data.streaming:
                require_usable(pair, min_size(data.sizes))
            yield from self._images(pair, data.sizes[bucket], [False, True] if self.random_flip else [False])

    def _images(
        self, pair: Pair, size: tuple[int, int], flips: list[bool]
    ) -> Iterator[tuple[Sample, tuple[int, int], bool]]:
        samples = (pair.image, pair.condition) if self.conditions else (pair.image,)
        for flip in flips:
            for sample in samples:
                yield sample, size, flip
