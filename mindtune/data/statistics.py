"""What a check of a data set measures: problems, sizes, duplicates, and what cropping cuts off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional

from mindtune.data import buckets
from mindtune.data.buckets import MinSize
from mindtune.data.checks import image_notes, mask_problem, size_problem
from mindtune.data.image_sample import Sample
from mindtune.data.inspection import Inspection, inspect
from mindtune.data.order import prefetch
from mindtune.data.pair_checks import PairInspection, PairNotes, inspect_pair
from mindtune.data.pairs import Pair, Pairs


class Item(NamedTuple):
    """An image or a pair of a data set.

    size: (width, height) in pixels; None if it cannot be used.
    problem: why it cannot be used; None if it can.
    digest: the hash of its files; "" if it cannot be used.
    """

    name: str
    size: Optional[tuple[int, int]]
    problem: Optional[str]
    digest: str
    caption: Optional[str]


def inspect_images(samples: list[Sample], min_size: MinSize, threads: int, flag: str, notes: list[str]) -> list[Item]:
    """Decodes the images of all samples. Appends to `notes` what a run would print about them, starting with `flag`."""

    def inspect_at(index: int) -> tuple[Item, Inspection]:
        sample = samples[index]
        inspection = inspect(sample)
        problem = inspection.problem or size_problem(inspection.size, min_size)
        problem = problem or mask_problem(sample, inspection, inspect)
        inspection = inspection._replace(problem=problem)
        digest = "" if problem else inspection.digests["white"]
        return Item(sample.name, inspection.size, inspection.problem, digest, sample.caption), inspection

    inspected = list(prefetch(inspect_at, range(len(samples)), threads))
    notes += image_notes(((item.name, inspection) for item, inspection in inspected), flag)
    return [item for item, _ in inspected]


def inspect_pairs(pairs: Pairs, min_size: MinSize, threads: int, flag: str, notes: list[str]) -> list[Item]:
    """Decodes both images of all pairs. Appends to `notes` what a run would print about them, starting with `flag`."""

    def inspect_at(index: int) -> tuple[Pair, PairInspection, Item]:
        pair = pairs[index]
        inspection = inspect_pair(pair, min_size)
        digest = "" if inspection.problem else inspection.digest
        return pair, inspection, Item(pair.image.name, inspection.size, inspection.problem, digest, pair.caption)

    items = []
    pair_notes = PairNotes()
    for pair, inspection, item in prefetch(inspect_at, range(len(pairs)), threads):
        pair_notes.add(pair, inspection)
        items.append(item)
    notes += pair_notes.lines(flag)
    return items


def cropped_shares(items: Iterable[Item], settings: buckets.Settings) -> dict[tuple[int, int], list[float]]:
    """For every size (height, width) the `cropped_share` of each of its items that can be used."""
    images = [item.size for item in items if not item.problem]
    found = buckets.assign(images, settings)
    shares: dict[tuple[int, int], list[float]] = {size: [] for size in found.sizes}
    for image, bucket in zip(found.images, found.bucket_ids):
        size = found.sizes[bucket]
        shares[size].append(buckets.cropped_share(images[image], size))
    return shares


def duplicates(items: Iterable[Item]) -> list[list[str]]:
    """The names of items with identical files, one list for each group of them."""
    names_by_digest = {}
    for item in items:
        if item.digest:
            names_by_digest.setdefault(item.digest, []).append(item.name)
    return [names for names in names_by_digest.values() if len(names) > 1]
