"""Conditions that have sizes of their own, such as the sources of FLUX.1-Kontext: their crops, and buckets of pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Optional

import numpy as np

from mindtune.cli import short_list
from mindtune.data.buckets import Assignment, Size, auto_shape, covers
from mindtune.data.masks import shape_problem

# A graph is compiled for every combination of sizes, so there are few shapes: 13 from 256x256 pixels on. (The pipeline
# of FLUX.1-Kontext has 17.) Their sides are multiples of a sixteenth of a square crop's side.
STEPS = 16
MAX_RATIO = 2.0


def condition_crop(image: tuple[int, int], condition: tuple[int, int], size: Size) -> Size:
    """The (height, width) that a condition is cropped to if its image is cropped to `size`.

    `image` and `condition` are (width, height). A condition of the image's shape, at any scale, is cropped like the
    image. Another one is cropped to the shape of `auto_shape` that cuts off the least of it, with about as many pixels
    as `size`. The sides are multiples of 16.
    """
    if shape_problem(image, condition) is None:
        return size
    side = math.sqrt(math.prod(size))
    step = 16 * max(1, round(side / STEPS / 16))
    # The nearest square, so that crops of nearly as many pixels share their shapes.
    side = step * max(1, round(side / step))
    return auto_shape(condition, side**2, step, MAX_RATIO, None)


def split_by_conditions(
    found: Assignment, images: Sequence[tuple[int, int]], conditions: Sequence[Optional[tuple[int, int]]]
) -> Assignment:
    """The crops of pairs with a bucket for each combination of an image's and a condition's size.

    `found` are the crops of the images. `images` and `conditions` are (width, height), None for no condition. Buckets
    without a pair are left out. Those of one size of images follow each other, the one with the most pairs first.
    """
    keys = []
    for i, bucket in zip(found.images.tolist(), found.bucket_ids.tolist()):
        condition = conditions[i]
        keys.append((bucket, condition and condition_crop(images[i], condition, found.sizes[bucket])))
    counts = Counter(keys)
    buckets = sorted(counts, key=lambda key: (key[0], -counts[key], key[1] or ()))
    numbers = {key: number for number, key in enumerate(buckets)}
    return Assignment(
        [found.sizes[bucket] for bucket, _ in buckets],
        found.images,
        np.array([numbers[key] for key in keys], int),
        [size for _, size in buckets],
    )


def enlarged(found: Assignment, conditions: Sequence[Optional[tuple[int, int]]]) -> list[int]:
    """The indices of the conditions that are smaller than a crop of theirs; arguments as in `split_by_conditions`."""
    sizes = [found.condition_sizes[bucket] for bucket in found.bucket_ids]
    crops = ((i, size) for i, size in zip(found.images.tolist(), sizes) if size)
    return list(dict.fromkeys(i for i, size in crops if not covers(conditions[i], size)))


def enlarged_note(names: list[str], flag: str) -> list[str]:
    """A line that starts with `flag` about the pairs of these names, whose conditions are enlarged; none without."""
    if not names:
        return []
    what = "conditions are smaller than their crops, and are enlarged"
    return [f"{flag}: {len(names)} {what}: those of {short_list(names)}"]
