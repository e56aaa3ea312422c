"""Pairs of a data set that is never held in memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from itertools import islice
from typing import Callable, Optional

from PIL import Image

from mindtune.cli import UserError, shown
from mindtune.data.columns import Source
from mindtune.data.image_problems import problem
from mindtune.data.image_sample import Sample, encoded
from mindtune.data.images import is_transparent
from mindtune.data.pair_checks import Notes, usable_pair
from mindtune.data.pairs import Pair
from mindtune.data.tables import open_rows
from mindtune.rng import generator

PEEK, FAR = 16, 256  # the first 16 transparent conditions among a stream's first 256 rows decide what such are laid on


class PairStream:
    """The first `count` pairs (None: no end) of a data set that is never held: pass after pass, shuffled anew in a buffer of rows.

    The order depends on `seed` and `buffer_size` only, so iterating again, or from a position, gives the same pairs. Their samples hold
    the encoded pictures. Sources and errors are those of `load_pairs`; a pair without one of its pictures raises UserError when reached.
    """

    def __init__(
        self,
        source: Source,
        seed: int = 0,
        buffer_size: int = 1000,
        count: Optional[int] = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.dataset, self.columns = open_rows(source, streaming=True, say=say)
        self.name, self.root = source.name, source.root
        self.seed, self.buffer_size, self.count, self.background = seed, buffer_size, count, "white"
        notes = self._first_look()
        self.background = notes.background
        for line in notes.lines(f"{source.flag} {shown(source.name)}, {notes.count} pairs of its first {FAR} rows"):
            say(line)

    def _first_look(self) -> Notes:
        """Of the first pairs, and then of those whose condition may be transparent. What is wrong is said when it is reached."""
        notes = Notes()
        with contextlib.suppress(Exception):  # the stream breaks off
            for place, row in enumerate(islice(self.dataset, FAR)):
                if place >= PEEK <= notes.transparent:
                    break
                with contextlib.suppress(Exception):  # a bad row
                    pair = self._pair(row, place)
                    if place < PEEK or is_transparent(Image.open(io.BytesIO(pair.condition.source))):
                        notes.add(pair, usable_pair(pair, 1))
        return notes

    def __iter__(self) -> Iterator[Pair]:
        return self.from_position(0)

    def from_position(self, start: int) -> Iterator[Pair]:
        """The pairs from number `start` on, as a full iteration gives them. Those before are passed over without being decoded."""
        rows = self._rows(start) if self.count is None else islice(self._rows(start), max(0, self.count - start))
        return (self._pair(row, position) for position, row in enumerate(rows, start))

    def _rows(self, start: int) -> Iterator[dict]:
        number, offset = 0, start
        while True:
            length = 0
            for row in self._pass(number):
                length += 1
                if length > offset:
                    yield row
            if not length:
                raise UserError(f"{self.name}: the data set has no rows. Give one that has.")
            # Every pass is as long as the first, so the whole passes before `start` need no reading.
            number, offset = number + max(1, offset // length), offset % length if offset >= length else 0

    def _pass(self, number: int) -> Iterator[dict]:
        # A seed of its own for every pass rather than set_epoch, which would change the order under another iterator's feet.
        seed = int(generator(self.seed, "stream", number).integers(2**63))
        try:
            yield from self.dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        except (
            Exception
        ) as error:  # a torn shard, a lost connection, a cell of another type: the library has no kind in common
            raise UserError(f"{self.name}: the datasets library cannot read on in pass {number}: {error!r}") from None

    def _pair(self, row: dict, position: int) -> Pair:
        name, images = f"{shown(self.name)}, place {position} of the stream", []
        for what, column, background in zip(("image", "condition"), self.columns, ("white", self.background)):
            try:
                images.append(Sample(name, encoded(row[column], self.root), background=background))
            except Exception as error:  # reading a URL raises many kinds
                raise UserError(
                    f"{name}: its {what}: {problem(error)}. Mend the data set, or remove the pair from it."
                ) from None
        return Pair(*images, row[self.columns.caption] or "")
