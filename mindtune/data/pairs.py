"""Pairs for ControlNet training: a target image, its condition image and a caption."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from mindtune.cli import UserError, printable
from mindtune.data.columns import Columns, Source
from mindtune.data.image_sample import LONGEST_PATH, Sample
from mindtune.data.named_files import is_url_or_base64
from mindtune.data.tables import open_rows

BLOCK = 1000  # rows whose texts are read at a time


class Pair(NamedTuple):
    """A target image, its condition image, and the caption ("" if there is none)."""

    image: Sample
    condition: Sample
    caption: str


class PairFacts:
    """What was found out about `count` pairs: the size of the images, and their digests on each background."""

    def __init__(self, count: int) -> None:
        self.sizes = np.zeros((count, 2), dtype=np.int32)  # upright width and height in pixels; 0: not known
        self.images = np.zeros((count, 32), dtype=np.uint8)
        self.conditions = {"white": np.zeros((count, 32), np.uint8), "black": np.zeros((count, 32), np.uint8)}

    def set(self, index: int, size: tuple[int, int], image: dict[str, str], condition: dict[str, str]) -> None:
        """Sets the size of a pair, and the digests of its image and condition by background."""
        self.sizes[index] = size
        self.images[index] = np.frombuffer(bytes.fromhex(image["white"]), np.uint8)
        for background, digest in condition.items():
            self.conditions[background][index] = np.frombuffer(bytes.fromhex(digest), np.uint8)

    def select(self, indices: np.ndarray) -> PairFacts:
        """The facts of the pairs at `indices`."""
        chosen = PairFacts(0)
        chosen.sizes, chosen.images = self.sizes[indices], self.images[indices]
        chosen.conditions = {background: digests[indices] for background, digests in self.conditions.items()}
        return chosen


class Pairs:
    """The pairs of a `datasets.Dataset` as a sequence. Images are read when they are opened.

    `rows` are the indices of the rows that are used (None: all), `root` is the directory that relative paths start
    from, `background` the colour behind transparent condition images, and `facts` what a check has found out. Pickles
    to a few kilobytes, and 104 bytes per pair of `facts`: the rows stay in the files of the data set.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Columns,
        name: str,
        rows: Optional[np.ndarray] = None,
        root: Optional[str] = None,
        background: str = "white",
        facts: Optional[PairFacts] = None,
    ) -> None:
        self.dataset = dataset
        self.columns = columns
        self.name = name
        self.rows = rows
        self.root = root
        self.background = background
        self.facts = facts
        self.image_columns = {column: dataset.select_columns([column]) for column in (columns.image, columns.condition)}
        # Only the columns of text: a row of the whole data set would be read with the bytes of its images.
        flat = dataset.flatten()
        text_columns = [
            column
            for column, feature in flat.features.items()
            if getattr(feature, "dtype", "") in ("string", "large_string")
        ]
        self.texts = flat.select_columns(sorted(text_columns))

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        position = range(len(self))[index]  # raises IndexError, and counts negative indices from the end
        row = position if self.rows is None else int(self.rows[position])
        return self._pair(position, row, self.texts[row])

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self), BLOCK):  # one row at a time would take five times as long
            positions = range(start, min(start + BLOCK, len(self)))
            rows = positions if self.rows is None else self.rows[start : positions.stop]
            texts = self.texts[rows]
            for number, (position, row) in enumerate(zip(positions, rows)):
                yield self._pair(position, int(row), {column: cells[number] for column, cells in texts.items()})

    def _pair(self, position: int, row: int, texts: dict[str, str]) -> Pair:
        def sample(column: str, background: str) -> Sample:
            path = texts.get(f"{column}.path", texts.get(column))
            name = _image_name(self.name, row, path)
            return Sample(name, (self.image_columns[column], row, column), background=background, root=self.root)

        image = sample(self.columns.image, "white")
        condition = sample(self.columns.condition, self.background)
        if self.facts and self.facts.sizes[position].any():
            image.size = condition.size = tuple(self.facts.sizes[position].tolist())
            image.known_digest = self.facts.images[position].tobytes().hex()
            condition.known_digest = self.facts.conditions[self.background][position].tobytes().hex()
        return Pair(image, condition, texts[self.columns.caption] or "")

    def select(self, indices: Iterable[int]) -> Pairs:
        """The pairs at `indices`, in that order. Raises IndexError for an index out of range."""
        indices = np.fromiter(indices, dtype=np.int64)
        rows = np.arange(len(self.dataset)) if self.rows is None else self.rows
        return self._with(rows[indices], self.background, self.facts and self.facts.select(indices))

    def with_facts(self, facts: PairFacts, background: str) -> Pairs:
        """The same pairs with the facts of each, and with transparent condition images on `background`."""
        return self._with(self.rows, background, facts)

    def _with(self, rows: Optional[np.ndarray], background: str, facts: Optional[PairFacts]) -> Pairs:
        return Pairs(
            dataset=self.dataset,
            columns=self.columns,
            name=self.name,
            rows=rows,
            root=self.root,
            background=background,
            facts=facts,
        )


def _image_name(dataset_name: str, row: int, path: Optional[str]) -> str:
    """The name of an image in messages: its path or URL, or else the name of the data set and the row.

    A relative path is not used: those that a data set stores with its bytes need not be unique.
    """
    if not path or len(path) > LONGEST_PATH:
        is_file = False
    elif "://" in path:
        is_file = is_url_or_base64(path)
    else:  # a JPEG in base64 starts with /9j/, like an absolute path
        is_file = os.path.isabs(path) and not is_url_or_base64(path)
    return printable(path) if is_file else f"{printable(dataset_name)}[{row}]"


def load_pairs(source: Source, say: Callable[[str], None] = print) -> Pairs:
    """The pairs of a data set: its split train, or its only split.

    A directory may hold parquet or arrow files, images with metadata, .tar shards in WebDataset layout, or the output
    of `Dataset.save_to_disk`. `say` receives a line for everything that is not used. Raises UserError for what cannot
    be read and for missing columns.
    """
    dataset, columns = open_rows(source, streaming=False, say=say)
    if not len(dataset):
        raise UserError(f"{source.name}: the data set has no rows. Give one that has.")
    return Pairs(dataset, columns, source.name, root=source.root)
