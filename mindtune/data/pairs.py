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


class Pair(NamedTuple):
    """A target image, its condition image, and the caption ("" if there is none)."""

    image: Sample
    condition: Sample
    caption: str


class Pairs:
    """The pairs of a `datasets.Dataset` as a sequence. Images are read when they are opened.

    `rows` are the indices of the rows that are used (None: all), `root` is the directory that relative paths start
    from, and `background` the colour behind transparent condition images. Pickles to a few kilobytes: the rows stay
    in the files of the data set.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Columns,
        name: str,
        rows: Optional[np.ndarray] = None,
        root: Optional[str] = None,
        background: str = "white",
    ) -> None:
        self.dataset = dataset
        self.columns = columns
        self.name = name
        self.rows = rows
        self.root = root
        self.background = background
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
        texts = self.texts[row]

        def sample(column: str, background: str) -> Sample:
            path = texts.get(f"{column}.path", texts.get(column))
            name = _image_name(self.name, row, path)
            return Sample(name, (self.image_columns[column], row, column), background=background, root=self.root)

        image = sample(self.columns.image, "white")
        condition = sample(self.columns.condition, self.background)
        return Pair(image, condition, texts[self.columns.caption] or "")

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def select(self, indices: Iterable[int]) -> Pairs:
        """The pairs at `indices`, in that order. Raises IndexError for an index out of range."""
        rows = np.arange(len(self.dataset)) if self.rows is None else self.rows
        return self._with(rows=rows[np.fromiter(indices, dtype=np.int64)], background=self.background)

    def with_background(self, background: str) -> Pairs:
        """The same pairs with transparent condition images on `background`."""
        return self if background == self.background else self._with(rows=self.rows, background=background)

    def _with(self, rows: Optional[np.ndarray], background: str) -> Pairs:
        return Pairs(
            dataset=self.dataset,
            columns=self.columns,
            name=self.name,
            rows=rows,
            root=self.root,
            background=background,
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
