"""The pairs of a run, and its batches by their numbers. `image_data` does the same for images without conditions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from mindtune.cli import print_lines
from mindtune.data import buckets, captions
from mindtune.data.bucket_order import BucketOrder
from mindtune.data.columns import Source
from mindtune.data.condition_sizes import condition_crop, enlarged, enlarged_note, split_by_conditions
from mindtune.data.draws import HeldOutDraws, TrainingDraws
from mindtune.data.image_facts import ImageFacts
from mindtune.data.image_sample import Sample
from mindtune.data.masks import shape_problem
from mindtune.data.order import prefetch, split
from mindtune.data.pair_checks import preflight_pairs, require_usable
from mindtune.data.pair_images import PairImages
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import Pair, Pairs, load_pairs
from mindtune.distributed import ranks
from mindtune.files import text_digest


class Settings(NamedTuple):
    """How a run reads its pairs. The fields have the names of the flags, but for `own_condition_size`.

    With `own_condition_size` a condition may have another size than its image, as the sources of FLUX.1-Kontext have.
    """

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
    stream; without it `images_of` does, before the VAE encodes them. With `own_condition_size` the buckets are the
    combinations of an image's and a condition's size, so `sizes` may have the same size several times.
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
        own_condition_size: bool = False,
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
        self.own_condition_size = own_condition_size
        self.background = train.background
        # The length of a stream is not known, so an epoch is the whole run.
        self.epoch_length = train.count if self.streaming else len(train)
        self.bucket_ids = bucket_ids if bucket_ids is not None else np.zeros(self.epoch_length, int)
        self.held_out_bucket_ids = (
            held_out_bucket_ids if held_out_bucket_ids is not None else np.zeros(len(held_out), int)
        )
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
        return [self._use(self.train[i], size, TrainingDraws(self.seed, "pair", i, use)) for i, use in uses]

    def _use(self, pair: Pair, size: tuple[int, int], draws: Union[TrainingDraws, HeldOutDraws]) -> PairUse:
        return PairUse(pair, size, draws, draws.caption(pair.caption, self.caption_settings))

    def held_out_use(self, sample_id: int, timestep: int) -> PairUse:
        """A held-out pair at a timestep."""
        size = self.sizes[self.held_out_bucket_ids[sample_id]]
        return self._use(self.held_out[sample_id], size, HeldOutDraws(self.seed, sample_id, timestep))

    def condition_size(self, pair: Pair, size: tuple[int, int]) -> Optional[tuple[int, int]]:
        """The (height, width) that a pair's condition is cropped to if its image is cropped to `size`.

        None if it has no condition; another size than `size` only for a condition of another shape, with
        `own_condition_size`, and not in a stream.
        """
        if pair.condition is None:
            return None
        if self.streaming or not self.own_condition_size:
            return size
        return condition_crop(pair.image.size, pair.condition.size, size)

    def condition_position(self, pair: Pair, position: Optional[tuple[float, float]]) -> Optional[tuple[float, float]]:
        """The position of the crop of a pair's condition, if its image is cropped at `position`: see `crops.crop_box`.

        A condition of another shape, where `condition_size` may give another size, is cropped in the middle.
        """
        if self.streaming or not self.own_condition_size:
            return position
        return None if shape_problem(pair.image.size, pair.condition.size) else position

    def encoded_images(self, pair: Pair, size: tuple[int, int]) -> list[tuple[Sample, tuple[int, int]]]:
        """(image, size) of what the VAE encodes of a pair whose image is cropped to `size`."""
        images = [(pair.image, size)]
        if self.images_per_sample == 2 and pair.condition:
            images.append((pair.condition, self.condition_size(pair, size)))
        return images

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
        flip = use.draws.flip(random_flip)
        return [(sample, size, flip) for sample, size in self.encoded_images(use.sample, use.size)]

    def fingerprint(self) -> str:
        """A hash of the contents of all training pairs. All streams have the same: they are not read in advance."""
        pairs = () if self.streaming else self.train
        return text_digest(
            pair.image.digest + (pair.condition.digest if pair.condition else "no condition") + pair.caption
            for pair in pairs
        )

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
            require_usable(use.sample, buckets.covering(self.sizes), self.own_condition_size)
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
    own_condition_size = settings.own_condition_size
    common = {
        "seed": seed,
        "batch_size": settings.train_batch_size,
        "caption_settings": caption_settings,
        "encode_conditions": encode_conditions,
        "own_condition_size": own_condition_size,
    }
    if settings.streaming:
        samples_per_update = settings.train_batch_size * settings.gradient_accumulation_steps * ranks.world_size()
        count = settings.max_train_steps * samples_per_update
        stream = PairStream(source, seed, settings.shuffle_buffer_size, count, own_condition_size=own_condition_size)
        sizes = buckets.crop_sizes(crops)
        return PairData(stream, [], sizes=sizes, check_pairs=not settings.cache_latents, **common)
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
        own_condition_size,
    )
    images = [tuple(size) for size in pairs.facts.sizes.tolist()]
    found = buckets.assign(images, crops)
    if own_condition_size:
        conditions = [tuple(size) if any(size) else None for size in pairs.facts.condition_sizes.tolist()]
        found = split_by_conditions(found, images, conditions)
        names = [pairs[i].image.name for i in enlarged(found, conditions)]
        print_lines(enlarged_note(names, f"{source.flag} {source.name}"))
    if settings.auto_buckets or (own_condition_size and len(found.sizes) > 1):
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
        **common,
    )
