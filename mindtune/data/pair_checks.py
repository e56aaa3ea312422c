"""Checking pairs: sizes, blank and transparent conditions."""

from __future__ import annotations

from typing import NamedTuple, Union

import numpy as np

from mindtune.cli import UserError, few
from mindtune.data.checks import Inspection, MinSize, image_notes, inspect, report_bad, too_small
from mindtune.data.images import Ink, ground
from mindtune.data.order import prefetch
from mindtune.data.pairs import Pair, Pairs


def preflight_pairs(pairs: Pairs, wanted: MinSize, flag: str, skip_bad: bool, threads: int = 2) -> Pairs:
    """Decodes both images of every pair and gives the usable pairs, transparent conditions laid on what shows them.

    Raises UserError naming every problem at once (one of the two missing or unreadable, sizes that differ, smaller than the
    resolution or than its own bucket), or, with `skip_bad`, prints that list and goes on without them; also if none is left.
    """
    usable, bad, notes = np.ones(len(pairs), dtype=bool), [], Notes()
    found = prefetch(lambda i: (pairs[i], usable_pair(pairs[i], wanted)), range(len(pairs)), max(1, threads))
    for index, (pair, looked) in enumerate(found):
        notes.add(pair, looked)
        if isinstance(looked.size, str):
            usable[index] = False
            bad.append(f"{pair.image.name}: {looked.size}")
    report_bad(bad, f"{len(pairs)} pairs", flag, skip_bad)
    if not usable.any():
        raise UserError(f"{flag}: no usable pair is left.")
    for line in notes.lines(flag):
        print(line)
    return (pairs.select(np.flatnonzero(usable)) if bad else pairs).on(notes.background)


class PairInspection(NamedTuple):
    """(width, height) of both images of a pair, or what keeps it from being trained on; and what decoding each of them found."""

    size: Union[tuple[int, int], str]
    image: Inspection
    condition: Inspection


def usable_pair(pair: Pair, wanted: MinSize) -> PairInspection:
    """Decodes both images wholly."""
    image, condition = inspect(pair.image), inspect(pair.condition, condition=True)
    size, other = image.size, condition.size
    wrong = [f"{what}{found}" for what, found in (("", size), ("its condition: ", other)) if isinstance(found, str)]
    if not wrong and size != other:
        wrong = [f"{size[0]}x{size[1]}, its condition {other[0]}x{other[1]}"]
    if not wrong:
        small = too_small(size, wanted)
        wrong = [small] if small else []
    return PairInspection("; ".join(wrong) if wrong else size, image, condition)


class Notes:
    """What is to be said of the usable pairs of a data set: animations, conditions of one colour, and what transparent ones lie on."""

    def __init__(self) -> None:
        self.images, self.flat, self.count, self.transparent, self.ink = [], {"white": [], "black": []}, 0, 0, Ink()

    def add(self, pair: Pair, looked: PairInspection) -> None:
        if isinstance(looked.size, str):
            return
        self.count += 1
        found = ((pair.image.name, looked.image), (pair.condition.name, looked.condition))
        self.images += [(name, each) for name, each in found if each.animated or each.dark]
        if looked.condition.ink:
            self.transparent, self.ink = self.transparent + 1, Ink(*map(sum, zip(self.ink, looked.condition.ink)))
        for background in looked.condition.flat_on:
            self.flat[background].append(pair.condition.name)

    @property
    def background(self) -> str:
        """What transparent conditions are laid on: one colour for the whole data set, so that all of them look alike."""
        return ground(self.ink)

    def lines(self, flag: str) -> list[str]:
        flat, lines, lost = self.flat[self.background], image_notes(self.images, flag), self.ink.lost(self.background)
        if self.background == "black":
            unseen = f"on white {self.ink.lost('white'):.0%} of their drawing would not be seen"
            lines.append(f"{flag}: {self.transparent} transparent conditions are laid on black; {unseen}")
        if lost >= 0.1:
            what = f"{self.transparent} transparent conditions are laid on {self.background}, where {lost:.0%} of their drawing is not seen"
            lines.append(f"{flag}: {what}. Give them a ground that shows all of it.")
        if flat:
            lines.append(
                f"{flag}: {len(flat)} of {self.count} conditions are blank, of one colour throughout: {few(flat)}"
            )
        return lines


def require_usable(pair: Pair, wanted: MinSize) -> None:
    """Raises UserError for a pair that `preflight_pairs` would refuse: for streams, which are checked in passing."""
    if isinstance(wrong := usable_pair(pair, wanted).size, str):
        raise UserError(f"{pair.image.name}: {wrong}. Mend the data set, or remove the pair from it.")
