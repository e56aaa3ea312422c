"""Checks pairs before a model is loaded, and chooses the background for transparent condition images."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import numpy as np

from mindtune.cli import UserError, progress_bar, short_list
from mindtune.data.buckets import MinSize
from mindtune.data.checks import image_notes, report_bad, size_problem
from mindtune.data.image_facts import ImageFacts
from mindtune.data.images import Visibility, choose_background
from mindtune.data.inspection import Inspection, inspect
from mindtune.data.order import prefetch
from mindtune.data.pairs import Pair, PairFacts, Pairs
from mindtune.distributed import ranks


class PairInspection(NamedTuple):
    """What decoding the two images of a pair shows.

    size: (width, height) of the image; None if there is a problem with the image or its condition.
    problem: why the pair cannot be used; None if it can.
    condition: None if the pair has no condition.
    """

    size: Optional[tuple[int, int]]
    problem: Optional[str]
    image: Inspection
    condition: Optional[Inspection]

    @property
    def digest(self) -> str:
        """A hash of both images, of a pair without a problem."""
        return "".join(found.digests["white"] for found in (self.image, self.condition) if found)


def preflight_pairs(
    pairs: Pairs,
    min_size: MinSize,
    flag: str,
    skip_bad: bool,
    threads: int = 2,
    facts: Optional[ImageFacts] = None,
    own_condition_size: bool = False,
) -> Pairs:
    """The pairs that can be used, with transparent condition images on the background that shows them.

    Decodes the images that `facts` does not know. Raises UserError that lists every pair with a missing or unreadable
    image, images of different sizes unless `own_condition_size`, or an image smaller than `min_size`; with `skip_bad`
    the list is printed instead. Raises UserError too if no pair is left.
    """
    usable = np.ones(len(pairs), dtype=bool)
    problems = []
    notes = PairNotes()
    found = PairFacts(len(pairs))
    facts = facts or ImageFacts()

    def inspect_one(pair: Pair) -> tuple[Pair, PairInspection]:
        return pair, inspect_pair(pair, min_size, own_condition_size, facts.inspect)

    with facts.opened(), progress_bar("checking", "pair", len(pairs), ranks.is_main_process()) as bar:
        for index, (pair, inspection) in enumerate(prefetch(inspect_one, pairs, max(1, threads))):
            notes.add(pair, inspection)
            if inspection.problem:
                usable[index] = False
                problems.append(f"{pair.image.name}: {inspection.problem}")
            else:
                found.set(index, inspection.image, inspection.condition)
            bar.update()
    report_bad(problems, f"{len(pairs)} pairs", flag, skip_bad)
    if not usable.any():
        raise UserError(f"{flag}: no usable pair is left. Give other pairs.")
    for line in notes.lines(flag):
        print(line)
    pairs = pairs.with_facts(found, notes.background)
    return pairs.select(np.flatnonzero(usable)) if problems else pairs


def inspect_pair(
    pair: Pair,
    min_size: MinSize,
    own_condition_size: bool = False,
    inspect_image: Callable[..., Inspection] = inspect,
) -> PairInspection:
    """Inspects both images of a pair, and compares their sizes unless `own_condition_size`."""
    image = inspect_image(pair.image)
    condition = inspect_image(pair.condition, condition=True) if pair.condition else None
    problem = _pair_problem(image, condition, min_size, own_condition_size)
    return PairInspection(None if problem else image.size, problem, image, condition)


def _pair_problem(
    image: Inspection, condition: Optional[Inspection], min_size: MinSize, own_condition_size: bool
) -> Optional[str]:
    problems = []
    if image.problem:
        problems.append(image.problem)
    if condition and condition.problem:
        problems.append(f"its condition: {condition.problem}")
    if problems:
        return "; ".join(problems)
    if condition and condition.size != image.size and not own_condition_size:
        return "{}x{}, its condition {}x{}".format(*image.size, *condition.size)
    return size_problem(image.size, min_size)


class PairNotes:
    """Collects notes on the usable pairs of a data set: on animations, and blank, transparent and lacking conditions.

    `count` is the number of usable pairs, `without_condition` that of pairs without a condition, and `transparent` that
    of transparent condition images.
    """

    def __init__(self) -> None:
        self.count = 0
        self.without_condition = 0
        self.transparent = 0
        self._first_without: list[str] = []  # names
        self._visibility = Visibility()  # the sum over the transparent condition images
        self._single_colour = {"white": [], "black": []}  # the names of the condition images, by background
        self._images = []

    def add(self, pair: Pair, inspection: PairInspection) -> None:
        if inspection.problem:
            return
        self.count += 1
        for sample, found in ((pair.image, inspection.image), (pair.condition, inspection.condition)):
            if found and (found.animated or found.is_dark):
                self._images.append((sample.name, found))
        if inspection.condition is None:
            self.without_condition += 1
            self._first_without = [*self._first_without, pair.image.name][:3]
            return
        if visibility := inspection.condition.visibility:
            self.transparent += 1
            self._visibility = Visibility(*map(sum, zip(self._visibility, visibility)))
        for background in inspection.condition.single_colour_on:
            self._single_colour[background].append(pair.condition.name)

    @property
    def background(self) -> str:
        """The background of transparent condition images, the same for the whole data set."""
        return choose_background(self._visibility)

    def lines(self, flag: str) -> list[str]:
        """The notes, each starting with `flag`."""
        background = self.background
        lines = image_notes(self._images, flag)
        conditions = self.count - self.without_condition
        if self.without_condition and conditions:
            share = f"{self.without_condition} of {self.count} pairs"
            lines.append(f"{flag}: {share} have no condition, such as {short_list(self._first_without)}")
        subject = f"{flag}: {self.transparent} transparent condition images are put on {background}"
        if background == "black":
            hidden = self._visibility.hidden_share("white")
            lines.append(f"{subject}; on white {hidden:.0%} of their drawing would not be visible")
        hidden = self._visibility.hidden_share(background)
        if hidden >= 0.1:
            lines.append(
                f"{subject}, where {hidden:.0%} of their drawing is not visible. "
                "Save them on a background that shows all of it."
            )
        if names := self._single_colour[background]:
            lines.append(
                f"{flag}: {len(names)} of {conditions} condition images are blank, all pixels have the same colour: "
                f"{short_list(names)}"
            )
        return lines


def require_usable(pair: Pair, min_size: MinSize, own_condition_size: bool = False) -> None:
    """Raises UserError for a pair that `preflight_pairs` refuses. Streams call it for each pair, as it is reached."""
    problem = inspect_pair(pair, min_size, own_condition_size).problem
    if problem:
        raise UserError(f"{pair.image.name}: {problem}. Fix the data set, or remove the pair from it.")
