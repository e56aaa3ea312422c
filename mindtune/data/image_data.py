"""The images of a LoRA run, and its batches by their numbers. `pair_data` does the same for ControlNet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Union

import numpy as np

from mindtune import rng
from mindtune.data import captions
from mindtune.data.bucket_order import BucketOrder
from mindtune.data.draws import HeldOutDraws, TrainingDraws
from mindtune.data.image_sample import Sample
from mindtune.data.order import prefetch, split
from mindtune.distributed import ranks
from mindtune.files import text_digest


class ImageUse(NamedTuple):
    """One use of an image: a script makes a row of a batch from it.

    `size` is the crop's (height, width) in pixels, `caption` the sample's caption as this use has it.
    """

    sample: Sample
    size: tuple[int, int]
    draws: Union[TrainingDraws, HeldOutDraws]
    caption: str


class ClassImages(NamedTuple):
    """Class images of prior preservation, with the bucket of each, int [N]."""

    samples: list[Sample]
    bucket_ids: np.ndarray


class ImageData:
    """Training images, held-out images and class images, and which of them make up the batch of a given number.

    A batch has `batch_size` instance images of one bucket and, with class images, as many class images of that bucket.
    An epoch uses every instance image `repeats` times, and is longer if there are more class images than that.
    `bucket_ids` are those of `samples`, int [N]. With several resolutions the same `Sample` may be there
    several times.
    """

    images_per_sample = 1

    def __init__(
        self,
        samples: list[Sample],
        bucket_ids: np.ndarray,
        class_images: ClassImages,
        *,
        sizes: list[tuple[int, int]],
        seed: int,
        batch_size: int,
        repeats: int = 1,
        validation_split: float = 0.0,
        caption_settings: captions.Settings = captions.UNCHANGED,
    ) -> None:
        # An image that is there several times, with a crop per resolution, is held out with all of its crops.
        numbers = {key: number for number, key in enumerate(dict.fromkeys(map(id, samples)))}
        held = set(split(len(numbers), validation_split, seed)[1])
        held_out = [i for i, sample in enumerate(samples) if numbers[id(sample)] in held]
        train = [i for i, sample in enumerate(samples) if numbers[id(sample)] not in held]
        # A sample that a concept repeats is there several times, so that each use has draws of its own.
        train = [i for i in train for _ in range(samples[i].setting("repeats", 1))]
        self.train = [samples[i] for i in train]
        self.held_out = [samples[i] for i in held_out]
        self.bucket_ids = bucket_ids[train]
        self.held_out_bucket_ids = bucket_ids[held_out]
        self.class_images = class_images
        self.sizes = sizes
        self.seed = seed
        self.caption_settings = caption_settings
        # These names are keys of random numbers: with others, a resumed run would have another order of samples.
        instance_stream, class_stream = ("instance {}", "class {}") if len(sizes) > 1 else ("instance", "class")
        self.order = BucketOrder(seed, self.bucket_ids, batch_size, instance_stream, repeats)
        self.class_ids = {}
        self.class_streams = {}
        for bucket in self.order.buckets if class_images.samples else ():
            self.class_ids[bucket] = np.flatnonzero(class_images.bucket_ids == bucket)
            self.class_streams[bucket] = rng.SampleStream(
                seed, class_stream.format(bucket), len(self.class_ids[bucket])
            )
        self.epoch_length = max(self.order.epoch_length, len(class_images.samples))

    def iterate(
        self, first: int, last: int, make_batch: Callable[[list[ImageUse]], Any], threads: int
    ) -> Iterator[Any]:
        """This rank's shard of the batches `first` to `last` - 1 of all ranks, prepared in advance by `threads`."""
        return prefetch(lambda number: make_batch(self.uses(number)), ranks.shard(range(first, last)), threads)

    def batches(self, first: int, last: int) -> Iterator[list[ImageUse]]:
        """The images of the batches `first` to `last` - 1 of all ranks."""
        return map(self.uses, range(first, last))

    def uses(self, number: int) -> list[ImageUse]:
        """The images of batch `number`: instance images, then class images."""
        place, position = self.order.place(number)
        bucket = self.order.buckets[place]
        size = self.sizes[bucket]
        instances = self.order.uses(place, position)
        uses = [self._use(self.train[i], size, TrainingDraws(self.seed, "instance", i, use)) for i, use in instances]
        for class_position in range(position, position + len(instances)) if self.class_images.samples else ():
            index, use = self.class_streams[bucket].at(class_position)
            i = int(self.class_ids[bucket][index])
            sample = self.class_images.samples[i]
            uses.append(ImageUse(sample, size, TrainingDraws(self.seed, "class", i, use), sample.caption))
        return uses

    def _use(self, sample: Sample, size: tuple[int, int], draws: Union[TrainingDraws, HeldOutDraws]) -> ImageUse:
        return ImageUse(sample, size, draws, draws.caption(sample.caption, sample.concept or self.caption_settings))

    def held_out_use(self, sample_id: int, timestep: int) -> ImageUse:
        """A held-out image at a timestep."""
        size = self.sizes[self.held_out_bucket_ids[sample_id]]
        return self._use(self.held_out[sample_id], size, HeldOutDraws(self.seed, sample_id, timestep))

    @property
    def count(self) -> int:
        """The number of different samples of the run."""
        return len({id(sample) for sample in (*self.train, *self.held_out, *self.class_images.samples)})

    def captions(self, held_out: bool = False) -> list[str]:
        """Every caption of the run in every form that is used, or with `held_out` those of the held-out images."""
        found = []
        for sample in () if held_out else self.train:
            found += captions.variants(sample.caption, sample.concept or self.caption_settings, self.seed)
        others = self.held_out + ([] if held_out else self.class_images.samples)
        return found + [sample.caption for sample in others]

    @property
    def captions_per_sample(self) -> int:
        """The largest number of forms of a caption."""
        settings = [sample.concept or self.caption_settings for sample in self.train]
        return max(each.tag_orders if each.shuffle_tags else 1 for each in settings)

    def images(self, random_flip: bool, held_out: bool = False) -> list[tuple[Sample, tuple[int, int], bool]]:
        """Every (image, size, flip) of the run, or with `held_out` those of the held-out images, for the encoders."""
        used = [] if held_out else [*zip(self.train, self.bucket_ids), *zip(*self.class_images)]

        def flips(sample: Sample) -> list[bool]:
            return [False, True] if sample.setting("random_flip", random_flip) else [False]

        return [
            *((sample, self.sizes[bucket], flip) for sample, bucket in used for flip in flips(sample)),
            *((sample, self.sizes[bucket], False) for sample, bucket in zip(self.held_out, self.held_out_bucket_ids)),
        ]

    def images_of(self, use: ImageUse, random_flip: bool) -> list[tuple[Sample, tuple[int, int], bool]]:
        """(image, size, flip) of a use, as in `images`."""
        return [(use.sample, use.size, use.draws.flip(use.sample.setting("random_flip", random_flip)))]

    def fingerprint(self) -> str:
        """A hash of the contents and captions of all images that are trained on."""
        return text_digest(
            sample.digest + sample.caption + (sample.mask.digest if isinstance(sample.mask, Sample) else "")
            for sample in self.train + self.class_images.samples
        )

    def facts(self) -> dict[str, Any]:
        """What run.json says about the data."""
        return {
            "samples": len(self.train),
            "held_out": list(dict.fromkeys(sample.name for sample in self.held_out)),
        }
