"""Aspect-ratio buckets: the sizes that images are cropped to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from mindtune.cli import UserError, print_lines

Size = tuple[int, int]  # (height, width) of a crop, in pixels
# The crop that an image must cover: the square of this side, or what the function returns for its (width, height).
MinSize = Union[int, Callable[[tuple[int, int]], Size]]


def parse_buckets(text: str) -> list[tuple[int, int]]:
    """The value of --aspect_ratio_buckets, such as "672,1568;688,1504", as a list of (height, width) in pixels.

    Raises UserError for sides that are not multiples of 16, for duplicates, and if there is no bucket.
    """
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
            raise UserError(f"--aspect_ratio_buckets: {height},{width} is given twice. Name every bucket once.")
        buckets.append((height, width))
    if not buckets:
        raise UserError(f"--aspect_ratio_buckets {text!r}: no bucket. Write them as height,width;height,width.")
    return buckets


class Settings(NamedTuple):
    """What images are cropped to. The fields have the names of the flags."""

    resolution: Union[int, list[int]] = 512
    aspect_ratio_buckets: Optional[str] = None
    auto_buckets: bool = False
    bucket_step: int = 64
    bucket_max_ratio: float = 2.0
    bucket_max_side: Optional[int] = None

    @classmethod
    def of(cls, flags: dict[str, Any]) -> Settings:
        """The settings among the values of all flags."""
        return cls(**{name: flags[name] for name in cls._fields})

    def largest(self) -> Size:
        """(height, width) of the largest crop, or with --auto_buckets a square that has at least as many pixels."""
        return max(crop_sizes(self), key=math.prod)


class Assignment(NamedTuple):
    """Crops of images: image `images[k]` is cropped to `sizes[bucket_ids[k]]`, int [K].

    An image has one crop, or with --auto_buckets one per resolution. `condition_sizes` are what the conditions of each
    bucket are cropped to, None for a bucket of pairs without; it is None if they are cropped like the images.
    """

    sizes: list[Size]
    images: np.ndarray
    bucket_ids: np.ndarray
    condition_sizes: Optional[list[Optional[Size]]] = None


def parse_resolution(text: str) -> Union[int, list[int]]:
    """The value of --resolution: a number, or several such as 512,768 as a list. Raises ValueError."""
    numbers = [int(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else sorted(set(numbers))


def resolutions(settings: Settings) -> list[int]:
    """The resolutions, the smallest first."""
    return settings.resolution if isinstance(settings.resolution, list) else [settings.resolution]


def crop_sizes(settings: Settings) -> list[Size]:
    """(height, width) of the sizes that a run crops to: the buckets, or without buckets the square of `resolution`.

    With --auto_buckets the sizes depend on the images, and this is the square that the largest ones do not exceed.
    """
    if settings.aspect_ratio_buckets:
        return parse_buckets(settings.aspect_ratio_buckets)
    side = resolutions(settings)[-1]
    return [(side, side)]


def min_size(settings: Settings) -> MinSize:
    """What images must cover: the square of --resolution, the nearest of the buckets, or their smallest own crop."""
    if settings.auto_buckets:
        return lambda image: auto_shape(image, resolutions(settings)[0] ** 2, *settings[-3:])
    return resolutions(settings)[0] if not settings.aspect_ratio_buckets else covering(crop_sizes(settings))


def covering(sizes: list[Size]) -> MinSize:
    """What images must cover that are cropped to the nearest of `sizes`."""
    is_square = len(sizes) == 1 and sizes[0][0] == sizes[0][1]
    return sizes[0][0] if is_square else lambda image: sizes[nearest_bucket(image, sizes)]


def assign(images: Sequence[tuple[int, int]], settings: Settings) -> Assignment:
    """The crops of images of these (width, height).

    With --auto_buckets the size that most images have comes first, and an image has a crop per resolution that it
    covers, so none is enlarged.
    """
    if not settings.auto_buckets:
        sizes = crop_sizes(settings)
        return Assignment(sizes, np.arange(len(images)), bucket_ids(images, sizes))
    crops = []
    for i, image in enumerate(images):
        shapes = [auto_shape(image, resolution**2, *settings[-3:]) for resolution in resolutions(settings)]
        crops += [(i, shape) for shape in dict.fromkeys(shapes) if covers(image, shape)]
    counts = Counter(shape for _, shape in crops)
    sizes = sorted(counts, key=lambda shape: (-counts[shape], -math.prod(shape), shape))
    numbers = {shape: number for number, shape in enumerate(sizes)}
    return Assignment(
        sizes, np.array([i for i, _ in crops], int), np.array([numbers[shape] for _, shape in crops], int)
    )


def of_samples(samples: list, settings: Settings, batch_size: int) -> tuple[list, np.ndarray, list[Size]]:
    """(samples, bucket ids, sizes): `assign` for `Sample`s. Prints a table of automatic sizes, and what is repeated."""
    images = [sample.size for sample in samples]
    found = assign(images, settings)
    if settings.auto_buckets:
        print(describe(images, found))
    print_lines(repeated(found, batch_size))
    return [samples[i] for i in found.images], found.bucket_ids, found.sizes


@cache
def auto_shape(image: tuple[int, int], pixels: int, step: int, max_ratio: float, max_side: Optional[int]) -> Size:
    """The crop that --auto_buckets makes for an image of this (width, height), with at most this number of pixels.

    Its sides are multiples of `step` and at most `max_side`, the longer one at most `max_ratio` times the shorter one.
    There is one shape per width, the highest, and the same on its side, because a graph is compiled for every shape.
    The one that cuts off the least is chosen.
    """
    longest = int(min(max_side or math.inf, math.sqrt(pixels) * math.sqrt(max_ratio)))
    sides = range(step, longest + 1, step)
    # Where only the ratio limits the height, the largest shape is enough: smaller ones have few pixels.
    limited = [width for width in sides if max_ratio * width < min(pixels // width, longest)]
    sides = sides[max(0, len(limited) - 1) :]
    highest = [(int(min(pixels // width, longest, max_ratio * width)) // step * step, width) for width in sides]
    shapes = [shape for shape in highest if shape[0] and max(shape) <= max_ratio * min(shape)]
    shapes += [(width, height) for height, width in shapes]
    return min(shapes, key=lambda shape: (round(cropped_share(image, shape), 9), -math.prod(shape)))


def covers(image: tuple[int, int], crop: Size) -> bool:
    """Whether an image of (width, height) need not be enlarged for a crop."""
    return image[0] >= crop[1] and image[1] >= crop[0]


def cropped_share(image: tuple[int, int], crop: Size) -> float:
    """The share of an image of (width, height) that is cut off after scaling it to cover a crop."""
    scale = max(crop[1] / image[0], crop[0] / image[1])
    return 1.0 - crop[0] * crop[1] / (image[0] * scale * image[1] * scale)


def repeated(found: Assignment, batch_size: int) -> list[str]:
    """A line if sizes have fewer images than a batch, whose batches then have some of them several times; or none."""
    counts = np.bincount(found.bucket_ids, minlength=len(found.sizes))
    small = int(np.sum((counts > 0) & (counts < batch_size)))
    if not small:
        return []
    return [
        f"{small} of {len(found.sizes)} sizes have fewer images than --train_batch_size {batch_size}, so their batches "
        "repeat images: give a smaller batch size, or fewer sizes (a larger --bucket_step)"
    ]


def describe(images: Sequence[tuple[int, int]], found: Assignment) -> str:
    """A table with a line per bucket: the number of images, and what cropping cuts off."""
    return table(rows(images, found))


class Row(NamedTuple):
    """A bucket: its size, the number of images, the mean and the largest of their `cropped_share`, and its conditions.

    `condition` is the bucket's `Assignment.condition_sizes`.
    """

    size: Size
    count: int
    cropped_mean: float
    cropped_most: float
    condition: Optional[Size] = None


def rows(images: Sequence[tuple[int, int]], found: Assignment) -> list[Row]:
    """The buckets of images of these (width, height)."""
    shares: list[list[float]] = [[] for _ in found.sizes]
    for i, bucket in zip(found.images, found.bucket_ids):
        shares[bucket].append(cropped_share(images[i], found.sizes[bucket]))
    conditions = found.condition_sizes or [None] * len(shares)
    return [
        Row(size, len(lost), sum(lost) / max(1, len(lost)), max(lost, default=0.0), condition)
        for size, lost, condition in zip(found.sizes, shares, conditions)
    ]


def table(rows: Sequence[Row]) -> str:
    """The buckets with a line each, and a column for conditions if they differ from the images, or some are missing."""
    with_conditions = any(row.condition for row in rows) and any(row.condition != row.size for row in rows)

    def line(size: str, condition: str, *cells: str) -> str:
        return " ".join([f"{size:14s}", *([f"{condition:14s}"] if with_conditions else []), *cells])

    lines = [line("height,width", "condition", f"{'images':>8s}  {'cropped away':>12s}  {'at most':>7s}")]
    for row in rows:
        cells = f"{row.count:8d}  {row.cropped_mean:12.1%}  {row.cropped_most:7.1%}"
        lines.append(line(_text(row.size), _text(row.condition), cells))
    return "\n".join(lines)


def _text(size: Optional[Size]) -> str:
    return f"{size[0]},{size[1]}" if size else "none"


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> int:
    """The index of the bucket (height, width) with the aspect ratio closest to that of `size` (width, height).

    The distance is |log(ratio of the two aspect ratios)|. It is compared in exact fractions; of equally close buckets
    the first is chosen.
    """

    def distance(bucket: tuple[int, int]) -> Fraction:
        a = size[0] * bucket[0]
        b = size[1] * bucket[1]
        return Fraction(max(a, b), min(a, b))

    return min(range(len(buckets)), key=lambda index: distance(buckets[index]))


def bucket_ids(images: Sequence[tuple[int, int]], buckets: list[Size]) -> np.ndarray:
    """The index of the nearest bucket of every image of (width, height), int [N]."""
    if len(buckets) == 1:
        return np.zeros(len(images), dtype=np.int64)
    return np.array([nearest_bucket(image, buckets) for image in images], dtype=np.int64)
