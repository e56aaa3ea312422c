"""The pairs of a ControlNet run, and its batches by their numbers. `image_data` does the same for LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from mindtune.cli import print_lines
from mindtune.data import buckets, captions
from mindtune.data.buckets import BucketOrder
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
    resolution: Union[int, list[int]]
    aspect_ratio_buckets: Optional[str] = None
    auto_buckets: bool = False
    bucket_step: int = 64
    bucket_max_ratio: float = 2.0
    bucket_max_side: Optional[int] = None
    max_train_samples: Optional[int] = None
    validation_split: float = 0.0
    skip_bad_images: bool = False
    dataloader_num_workers: int = 1
    cache_latents: bool = False
    streaming: bool = False
    shuffle_buffer_size: int = 1000
    max_train_steps: Optional[int] = None
    gradient_accumulation_steps: int = 1
    proportion_empty_prompts: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_orders: int = 8
    own_condition_size: bool = False


class PairUse(NamedTuple):
    """One use of a pair: a script makes a row of a batch from it.

    `size` is the crop's (height, width) in pixels, `caption` the pair's caption as this use has it.
    """

    sample: Pair
    size: tuple[int, int]
    draws: Union[TrainingDraws, HeldOutDraws]
    caption: str


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
        bucket_ids: Optional[np.ndarray] = None,
        held_out_bucket_ids: Optional[np.ndarray] = None,
        seed: int,
        batch_size: int,
        caption_settings: captions.Settings = captions.UNCHANGED,
        encode_conditions: bool = False,
        check_pairs: bool = False,
    ) -> None:
        self.train = train
        self.held_out = held_out
        self.sizes = sizes
        self.seed = seed
        self.batch_size = batch_size
        self.caption_settings = caption_settings
        self.streaming = isinstance(train, PairStream)
        self.images_per_sample = 2 if encode_conditions else 1
        self.check_pairs = check_pairs and self.streaming
        self.background = train.background
        # The length of a stream is not known, so an epoch is the whole run.
        self.epoch_length = train.count if self.streaming else len(train)
        self.bucket_ids = bucket_ids if bucket_ids is not None else np.zeros(self.epoch_length, int)
        self.held_out_bucket_ids = (
            held_out_bucket_ids if held_out_bucket_ids is not None else np.zeros(len(held_out), int)
        )
        self.order = None if self.streaming else BucketOrder(seed, self.bucket_ids, batch_size)

    def condition_size(self, pair, size):
        return size

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
        return [self._use(self.train[i], size, TrainingDraws(self.seed, "pair", i, use)) for i, use in uses]

    def _use(self, pair: Pair, size: tuple[int, int], draws: Union[TrainingDraws, HeldOutDraws]) -> PairUse:
        return PairUse(pair, size, draws, draws.caption(pair.caption, self.caption_settings))

    def held_out_use(self, sample_id: int, timestep: int) -> PairUse:
        """A held-out pair at a timestep."""
        size = self.sizes[self.held_out_bucket_ids[sample_id]]
        return self._use(self.held_out[sample_id], size, HeldOutDraws(self.seed, sample_id, timestep))

    def captions(self, held_out: bool = False) -> Iterator[str]:
        """Every caption of the run in every form that is used, or with `held_out` those of the held-out pairs."""
        yield from (pair.caption for pair in self.held_out)
        for pair in () if held_out else self.train:
            yield from captions.variants(pair.caption, self.caption_settings, self.seed)

    @property
    def captions_per_sample(self) -> int:
        """The largest number of forms of a caption."""
        return self.caption_settings.tag_orders if self.caption_settings.shuffle_tags else 1

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
            "held_out": list(dict.fromkeys(pair.image.name for pair in self.held_out)),
            "condition_background": self.background,
        }

    def _stream(self, first: int, last: int) -> Iterator[list[PairUse]]:
        """The batches `first` to `last` - 1 of a stream. The id of a pair is its position in the stream."""
        start = first * self.batch_size
        pairs = enumerate(self.train.from_position(start), start)
        for _ in range(first, last):
            yield [
                self._use(pair, self.sizes[0], TrainingDraws(self.seed, "pair", position, 0))
                for position, pair in itertools.islice(pairs, self.batch_size)
            ]

    def _checked(self, uses: list[PairUse], check: bool) -> list[PairUse]:
        for use in uses if check else ():
            require_usable(use.sample, buckets.covering(self.sizes))
        return uses


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
    crops = buckets.Settings.of(settings._asdict())
    caption_settings = captions.Settings(
        settings.proportion_empty_prompts, settings.shuffle_tags, settings.keep_tags, settings.tag_orders
    )
    if settings.streaming:
        samples_per_update = settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size()
        stream = PairStream(source, seed, settings.shuffle_buffer_size, settings.max_train_steps * samples_per_update)
        return PairData(
            stream,
            [],
            sizes=buckets.crop_sizes(crops),
            seed=seed,
            batch_size=settings.train_batch_size,
            caption_settings=caption_settings,
            encode_conditions=encode_conditions,
            check_pairs=not settings.cache_latents,
        )
    pairs = load_pairs(source)
    if settings.max_train_samples:
        pairs = pairs.select(range(min(settings.max_train_samples, len(pairs))))
    pairs = preflight_pairs(
        pairs,
        buckets.min_size(crops),
        f"{source.flag} {source.name}",
        settings.skip_bad_images,
        settings.dataloader_num_workers,
        facts,
    )
    images = [tuple(size) for size in pairs.facts.sizes.tolist()]
    found = buckets.assign(images, crops)
    if settings.auto_buckets:
        print(buckets.describe(images, found))
    print_lines(buckets.repeated(found, settings.train_batch_size))
    _, held_out = split(len(pairs), settings.validation_split, seed)
    is_held_out = np.isin(found.images, held_out)
    return PairData(
        pairs.select(found.images[~is_held_out]),
        list(pairs.select(found.images[is_held_out])),
        sizes=found.sizes,
        bucket_ids=found.bucket_ids[~is_held_out],
        held_out_bucket_ids=found.bucket_ids[is_held_out],
        seed=seed,
        batch_size=settings.train_batch_size,
        caption_settings=caption_settings,
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
