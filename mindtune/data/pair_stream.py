"""Pairs that are streamed from a data set, which is never held in memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from itertools import islice
from typing import Callable, Optional

from PIL import Image

from mindtune.cli import UserError, printable
from mindtune.data.columns import Source
from mindtune.data.image_problems import describe_problem
from mindtune.data.image_sample import Sample, is_empty_cell, read_cell
from mindtune.data.images import is_transparent
from mindtune.data.pair_checks import PairNotes, inspect_pair
from mindtune.data.pairs import Pair
from mindtune.data.tables import open_rows
from mindtune.rng import generator

# The background is chosen by up to 16 transparent condition images among the first 256 rows. Of those, the first 16
# rows are inspected in any case.
INSPECTED_ROWS = 16
EXAMINED_ROWS = 256
EACH_NEEDS_ONE = (
    "Pairs with and without one are never in one batch, and a stream is not sorted by that: leave --streaming out, or "
    "stream pairs that all have one."
)


class PairStream:
    """The first `count` pairs (None: endless) of a streamed data set, pass after pass.

    Each pass is shuffled anew, in a buffer of `buffer_size` rows. The order depends on `seed` and `buffer_size` only,
    so every iteration gives the same pairs, also from a position on. The samples hold the encoded images. Sources and
    errors are those of `load_pairs`; a pair without one of its images raises UserError when it is reached. With
    `own_condition_size` conditions may have another size than their images, and each pair needs one.
    """

    def __init__(
        self,
        source: Source,
        seed: int = 0,
        buffer_size: int = 1000,
        count: Optional[int] = None,
        say: Callable[[str], None] = print,
        own_condition_size: bool = False,
    ) -> None:
        self.dataset, self.columns = open_rows(source, streaming=True, say=say)
        if own_condition_size and not self.columns.condition:
            raise UserError(f"{source.flag} {printable(source.name)}: has no column of conditions. {EACH_NEEDS_ONE}")
        self.name = source.name
        self.root = source.root
        self.seed = seed
        self.buffer_size = buffer_size
        self.count = count
        self.condition_optional = source.condition_optional
        self.own_condition_size = own_condition_size
        self.background = "white"
        notes = self._inspect_first_rows()
        self.background = notes.background
        subject = f"{source.flag} {printable(source.name)}, {notes.count} pairs of its first {EXAMINED_ROWS} rows"
        for line in notes.lines(subject):
            say(line)

    def _inspect_first_rows(self) -> PairNotes:
        """Notes on the first pairs, and after these on pairs whose condition image may be transparent.

        Errors are ignored here, because they are raised when the pair is reached.
        """
        notes = PairNotes()
        with contextlib.suppress(Exception):  # the stream fails
            for position, row in enumerate(islice(self.dataset, EXAMINED_ROWS)):
                if position >= INSPECTED_ROWS and notes.transparent >= INSPECTED_ROWS:
                    break
                with contextlib.suppress(Exception):  # the row is invalid
                    pair = self._make_pair(row, position)
                    if position < INSPECTED_ROWS or self._may_be_transparent(pair.condition):
                        notes.add(pair, inspect_pair(pair, 1, self.own_condition_size))
        return notes

    @staticmethod
    def _may_be_transparent(condition: Optional[Sample]) -> bool:
        return condition is not None and is_transparent(Image.open(io.BytesIO(condition.source)))

    def __iter__(self) -> Iterator[Pair]:
        return self.from_position(0)

    def from_position(self, start: int) -> Iterator[Pair]:
        """The pairs from number `start` on, as in a full iteration. Skips earlier pairs without decoding them."""
        rows = self._rows(start)
        if self.count is not None:
            rows = islice(rows, max(0, self.count - start))
        return (self._make_pair(row, position) for position, row in enumerate(rows, start))

    def _rows(self, start: int) -> Iterator[dict]:
        """The rows of all passes from number `start` on."""
        number = 0
        offset = start
        while True:
            length = 0
            for row in self._read_pass(number):
                length += 1
                if length > offset:
                    yield row
            if not length:
                raise UserError(f"{self.name}: the data set has no rows. Give one that has.")
            # All passes have the same length, so the whole passes before `start` need not be read.
            number += max(1, offset // length)
            offset = offset % length if offset >= length else 0

    def _read_pass(self, number: int) -> Iterator[dict]:
        # A seed per pass instead of `set_epoch`, which would change the order of other iterators over the data set.
        seed = int(generator(self.seed, "stream", number).integers(2**63))
        try:
            yield from self.dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        except (
            Exception
        ) as error:  # a truncated shard, a lost connection, a cell of another type: there is no common class
            raise UserError(
                f"{self.name}: the datasets library cannot continue reading in pass {number}: {error!r}. "
                "Check the files of the data set and the connection, and start again."
            ) from None

    def _make_pair(self, row: dict, position: int) -> Pair:
        name = f"{printable(self.name)}, position {position} of the stream"

        def sample(what: str, column: str, background: str) -> Sample:
            try:
                return Sample(name, read_cell(row[column], self.root), background=background)
            except Exception as error:  # reading a URL raises many kinds
                problem = describe_problem(error)
                raise UserError(
                    f"{name}: its {what}: {problem}. Fix the data set, or remove the pair from it."
                ) from None

        image = sample("image", self.columns.image, "white")
        condition = None
        if not self.condition_optional or not is_empty_cell(row.get(self.columns.condition)):
            condition = sample("condition", self.columns.condition, self.background)
        elif self.own_condition_size:
            raise UserError(f"{name}: has no condition. {EACH_NEEDS_ONE}")
        return Pair(image, condition, row[self.columns.caption] or "")
