"""The pairs of a ControlNet run, and its batches by their numbers. `image_data` does the same for LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

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

    With `encode_conditions` the VAE encodes condition images, too. With `check_pairs`, `iterate` checks the pairs of a
    stream; without it `images_of` does, before the VAE encodes them.
    """

    def __init__(
        self,
        train: Union[Pairs, PairStream],
        held_out: list[Pair],
        *,
        sizes: list[tuple[int, int]],
        seed: int,
        batch_size: int,
        encode_conditions: bool = False,
        check_pairs: bool = False,
    ) -> None:
        self.train = train
        self.held_out = held_out
        self.sizes = sizes
        self.seed = seed
        self.batch_size = batch_size
        self.streaming = isinstance(train, PairStream)
        self.images_per_sample = 2 if encode_conditions else 1
        self.check_pairs = check_pairs and self.streaming
        self.background = train.background
        # The length of a stream is not known, so an epoch is the whole run.
        self.epoch_length = train.count if self.streaming else len(train)
        self.bucket_ids = None if self.streaming else _bucket_ids(train, sizes)
        self.held_out_bucket_ids = _bucket_ids(held_out, sizes)
        self.order = None if self.streaming else BucketOrder(seed, self.bucket_ids, batch_size)

    @property
    def count(self) -> int:
        """The number of pairs of the run."""
        return self.epoch_length + len(self.held_out)

    def iterate(self, first: int, last: int, make_batch: Callable[[list[PairUse]], Any], threads: int) -> Iterator[Any]:
        """This rank's shard of the batches `first` to `last` - 1 of all ranks, prepared in advance by `threads`."""
        if self.streaming:
            batches = itertools.islice(self._stream(first, last), ranks.rank(), None, ranks.world_size())
            return prefetch(lambda uses: make_batch(self._checked(uses, self.check_pairs)), batches, threads)
        return prefetch(lambda number: make_batch(self.uses(number)), ranks.shard(range(first, last)), threads)

    def batches(self, first: int, last: int) -> Iterator[list[PairUse]]:
        """The pairs of the batches `first` to `last` - 1 of all ranks."""
        return self._stream(first, last) if self.streaming else map(self.uses, range(first, last))

    def uses(self, number: int) -> list[PairUse]:
        """The pairs of batch `number`."""
        bucket, uses = self.order.at(number)
        size = self.sizes[bucket]
        return [PairUse(self.train[i], size, TrainingDraws(self.seed, "pair", i, use)) for i, use in uses]

    def held_out_use(self, sample_id: int, timestep: int) -> PairUse:
        """A held-out pair at a timestep."""
        size = self.sizes[self.held_out_bucket_ids[sample_id]]
        return PairUse(self.held_out[sample_id], size, HeldOutDraws(self.seed, sample_id, timestep))

    def captions(self, held_out: bool = False) -> Iterator[str]:
        """Every caption of the run, or with `held_out` those of the held-out pairs."""
        return (pair.caption for pair in (self.held_out if held_out else itertools.chain(self.held_out, self.train)))

    def images(self, random_flip: bool, held_out: bool = False) -> PairImages:
        """Every (image, size, flip) of the run, or with `held_out` those of the held-out pairs, for the encoders."""
        return PairImages(self, random_flip, held_out)

    def images_of(self, use: PairUse, random_flip: bool) -> list[tuple[Sample, tuple[int, int], bool]]:
        """(image, size, flip) of a use, as in `images`. The pairs of a stream are checked."""
        self._checked([use], self.streaming)
        samples = use.sample[: self.images_per_sample]
        return [(sample, use.size, use.draws.flip(random_flip)) for sample in samples]

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

    def _checked(self, uses: list[PairUse], check: bool) -> list[PairUse]:
        for use in uses if check else ():
            require_usable(use.sample, min_size(self.sizes))
        return uses


def _bucket_ids(pairs: Union[Pairs, list[Pair]], sizes: list[tuple[int, int]]) -> np.ndarray:
    if len(sizes) == 1:
        return np.zeros(len(pairs), dtype=np.int64)
    return bucket_ids((pair.image for pair in pairs), sizes)


def load(
    source: Source,
    settings: Settings,
    seed: int,
    facts: Optional[ImageFacts] = None,
    encode_conditions: bool = False,
) -> PairData:
    """Loads the pairs of a source, checks them, and splits them by `seed`. A stream is checked as it is read.

    With `encode_conditions` the VAE encodes condition images, too. An image that `facts` knows is not decoded again.
    Raises UserError that lists all problems.
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
            encode_conditions=encode_conditions,
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
        encode_conditions=encode_conditions,
    )


class PairImages:
    """Every (image, size, flip) of a run, read anew in each iteration, so that memory does not grow with the set."""

    def __init__(self, data: PairData, random_flip: bool, held_out: bool) -> None:
        self.data = data
        self.flips = [False, True] if random_flip else [False]
        self.held_out = held_out

    def __len__(self) -> int:
        train = 0 if self.held_out else len(self.data.train) * len(self.flips)
        return (train + len(self.data.held_out)) * self.data.images_per_sample

    def __iter__(self) -> Iterator[tuple[Sample, tuple[int, int], bool]]:
        data = self.data
        for pair, bucket in zip(data.held_out, data.held_out_bucket_ids):
            yield from self._images(pair, data.sizes[bucket], [False])
        for pair, bucket in zip(data.train, data.bucket_ids) if not self.held_out else ():
            yield from self._images(pair, data.sizes[bucket], self.flips)

    def _images(
        self, pair: Pair, size: tuple[int, int], flips: list[bool]
    ) -> Iterator[tuple[Sample, tuple[int, int], bool]]:
        for flip in flips:
            for sample in pair[: self.data.images_per_sample]:
                yield sample, size, flip
