"""What a check of a data set measures: problems, sizes, duplicates, and what cropping cuts off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional

from mindtune.data import buckets
from mindtune.data.buckets import MinSize
from mindtune.data.checks import image_notes, mask_problem, size_problem
from mindtune.data.condition_sizes import enlarged, split_by_conditions
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
    condition_size: (width, height) of the condition of a pair that can be used; None if it has none.
    """

    name: str
    size: Optional[tuple[int, int]]
    problem: Optional[str]
    digest: str
    caption: Optional[str]
    condition_size: Optional[tuple[int, int]] = None


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


def inspect_pairs(
    pairs: Pairs, min_size: MinSize, threads: int, flag: str, notes: list[str], own_condition_size: bool = False
) -> list[Item]:
    """Decodes both images of all pairs. Appends to `notes` what a run would print about them, starting with `flag`.

    `own_condition_size` is that of `pair_data.Settings`.
    """

    def inspect_at(index: int) -> tuple[Pair, PairInspection, Item]:
        pair = pairs[index]
        inspection = inspect_pair(pair, min_size, own_condition_size)
        name, problem, condition = pair.image.name, inspection.problem, inspection.condition
        digest = "" if problem else inspection.digest
        condition_size = condition.size if condition and not problem else None
        return pair, inspection, Item(name, inspection.size, problem, digest, pair.caption, condition_size)

    items = []
    pair_notes = PairNotes()
    for pair, inspection, item in prefetch(inspect_at, range(len(pairs)), threads):
        pair_notes.add(pair, inspection)
        items.append(item)
    notes += pair_notes.lines(flag)
    return items


def bucket_rows(
    items: Iterable[Item], settings: buckets.Settings, own_condition_size: bool = False
) -> tuple[list[buckets.Row], list[str]]:
    """The buckets of the items that can be used, as a run has them, and the names of pairs with enlarged conditions."""
    used = [item for item in items if not item.problem]
    images = [item.size for item in used]
    found = buckets.assign(images, settings)
    if not own_condition_size:
        return buckets.rows(images, found), []
    conditions = [item.condition_size for item in used]
    found = split_by_conditions(found, images, conditions)
    return buckets.rows(images, found), [used[i].name for i in enlarged(found, conditions)]


def duplicates(items: Iterable[Item]) -> list[list[str]]:
    """The names of items with identical files, one list for each group of them."""
    names_by_digest = {}
    for item in items:
        if item.digest:
            names_by_digest.setdefault(item.digest, []).append(item.name)
    return [names for names in names_by_digest.values() if len(names) > 1]
