"""Pairs for training: a target image, its condition image, which some systems do not need, and a caption."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from mindtune.cli import UserError, printable
from mindtune.data.columns import Columns, Source
from mindtune.data.image_sample import LONGEST_PATH, Sample
from mindtune.data.inspection import Inspection
from mindtune.data.named_files import is_url_or_base64
from mindtune.data.tables import open_rows

BLOCK = 1000  # rows that are read at a time


class Pair(NamedTuple):
    """A target image, its condition image, and the caption ("" if there is none).

    `condition` is None only with `Source.condition_optional`.
    """

    image: Sample
    condition: Optional[Sample]
    caption: str


class PairFacts:
    """What was found out about `count` pairs: the sizes of the images, and their digests on each background."""

    def __init__(self, count: int) -> None:
        # Upright width and height in pixels; 0: not known, or no condition.
        self.sizes = np.zeros((count, 2), dtype=np.int32)
        self.condition_sizes = np.zeros((count, 2), dtype=np.int32)
        self.images = np.zeros((count, 32), dtype=np.uint8)
        self.conditions = {"white": np.zeros((count, 32), np.uint8), "black": np.zeros((count, 32), np.uint8)}

    def set(self, index: int, image: Inspection, condition: Optional[Inspection]) -> None:
        """Sets what the inspections of a pair's image and of its condition, if it has one, have found."""
        self.sizes[index] = image.size
        self.images[index] = np.frombuffer(bytes.fromhex(image.digests["white"]), np.uint8)
        if condition is None:
            return
        self.condition_sizes[index] = condition.size
        for background, digest in condition.digests.items():
            self.conditions[background][index] = np.frombuffer(bytes.fromhex(digest), np.uint8)

    def select(self, indices: np.ndarray) -> PairFacts:
        """The facts of the pairs at `indices`."""
        chosen = PairFacts(0)
        chosen.sizes, chosen.condition_sizes = self.sizes[indices], self.condition_sizes[indices]
        chosen.images = self.images[indices]
        chosen.conditions = {background: digests[indices] for background, digests in self.conditions.items()}
        return chosen


class Pairs:
    """The pairs of a `datasets.Dataset` as a sequence. Images are read when they are opened.

    `rows` are the indices of the rows that are used (None: all), `root` is the directory that relative paths start
    from, `background` the colour behind transparent condition images, and `facts` what a check has found out.
    `has_condition`, bool per row of the data set, says which have a condition (None: all, if it has a column of them).
    Pickles to a few kilobytes, and 113 bytes per pair of `facts` and `has_condition`: the rows stay in the files of the
    data set.
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
        has_condition: Optional[np.ndarray] = None,
    ) -> None:
        self.dataset = dataset
        self.columns = columns
        self.name = name
        self.rows = rows
        self.root = root
        self.background = background
        self.facts = facts
        self.has_condition = has_condition
        self.image_columns = {
            column: dataset.select_columns([column]) for column in (columns.image, columns.condition) if column
        }
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
        has_condition = self.columns.condition and (self.has_condition is None or self.has_condition[row])
        condition = sample(self.columns.condition, self.background) if has_condition else None
        if self.facts and self.facts.sizes[position].any():
            image.size = tuple(self.facts.sizes[position].tolist())
            image.known_digest = self.facts.images[position].tobytes().hex()
            if condition:
                condition.size = tuple(self.facts.condition_sizes[position].tolist())
                condition.known_digest = self.facts.conditions[self.background][position].tobytes().hex()
        return Pair(image, condition, texts[self.columns.caption] or "")

    @property
    def condition_count(self) -> int:
        """The number of pairs that have a condition."""
        if not self.columns.condition or self.has_condition is None:
            return len(self) if self.columns.condition else 0
        return int(np.count_nonzero(self.has_condition if self.rows is None else self.has_condition[self.rows]))

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
            has_condition=self.has_condition,
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
    optional = source.condition_optional and columns.condition
    has_condition = _filled_cells(dataset, columns.condition) if optional else None
    if optional and not has_condition.any():
        where = f"{source.flag} {printable(source.name)}"
        say(f"{where}: column {columns.condition} is empty throughout, so no pair has a condition")
    return Pairs(dataset, columns, source.name, root=source.root, has_condition=has_condition)


def _filled_cells(dataset: Any, column: str) -> np.ndarray:
    """Which cells of a column are not empty, bool [N]. Like `is_empty_cell`, but reads no image."""
    table = dataset.select_columns([column]).with_format("arrow")
    blocks = (table[start : start + BLOCK].column(column) for start in range(0, len(dataset), BLOCK))
    return np.concatenate([_is_filled(block) for block in blocks])


def _is_filled(cells: Any) -> np.ndarray:
    import pyarrow
    import pyarrow.compute as pc

    if pyarrow.types.is_null(cells.type):
        return np.zeros(len(cells), dtype=bool)
    if pyarrow.types.is_struct(cells.type):
        names = [field.name for field in cells.type if field.name in ("bytes", "path")]
        return np.logical_or.reduce([_is_filled(pc.struct_field(cells, name)) for name in names])
    if cells.type in (pyarrow.string_view(), pyarrow.binary_view()):  # which have no length
        cells = cells.cast(pyarrow.large_binary())
    return pc.fill_null(pc.greater(pc.binary_length(cells), 0), False).to_numpy(zero_copy_only=False)
