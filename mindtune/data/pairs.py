"""Pairs for ControlNet training: a target image, its condition image and a caption; checked, put in order, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from mindtune.cli import UserError, shown
from mindtune.data.columns import Columns, Source
from mindtune.data.image_sample import Sample
from mindtune.data.named_files import elsewhere
from mindtune.data.tables import open_rows


class Pair(NamedTuple):
    """A target picture, the condition picture it is drawn from, and the caption ("" if the data set has none)."""

    image: Sample
    condition: Sample
    caption: str


class Pairs:
    """A sequence of pairs over a `datasets.Dataset`: `pairs[i]` reads names and a caption, the images are read when opened.

    `rows` are the rows that take part (None: all), `root` the directory that paths are relative to, `background` what transparent
    conditions are laid on. Pickles to a few kilobytes: the rows stay in the files of the data set.
    """

    def __init__(
        self, dataset: Any, columns: Columns, name: str, rows: Optional[np.ndarray] = None, root: Optional[str] = None,
        background: str = "white",
    ) -> None:  # fmt: skip
        self.dataset, self.columns, self.name, self.rows, self.root, self.background = (
            dataset,
            columns,
            name,
            rows,
            root,
            background,
        )
        self.pictures = {column: dataset.select_columns([column]) for column in columns[:2]}
        # Paths and captions apart from the pictures' bytes, which would be read along with every row.
        flat = dataset.flatten()
        texts = {
            column for column, kind in flat.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")
        }
        self.texts = flat.select_columns(sorted(texts))

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        place = range(len(self))[index]
        row = place if self.rows is None else int(self.rows[place])
        texts = self.texts[row]
        image, condition = (
            Sample(
                _title(self.name, row, texts.get(f"{column}.path", texts.get(column))),
                (self.pictures[column], row, column),
                background=background,
                root=self.root,
            )
            for column, background in zip(self.columns, ("white", self.background))
        )
        return Pair(image, condition, texts[self.columns.caption] or "")

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def select(self, indices: Iterable[int]) -> Pairs:
        """The pairs at `indices`, in that order. Raises IndexError for one that is not there."""
        rows = np.arange(len(self.dataset)) if self.rows is None else self.rows
        return Pairs(
            self.dataset,
            self.columns,
            self.name,
            rows[np.fromiter(indices, dtype=np.int64)],
            self.root,
            self.background,
        )

    def on(self, background: str) -> Pairs:
        """The same pairs, transparent conditions laid on `background`."""
        if background == self.background:
            return self
        return Pairs(self.dataset, self.columns, self.name, self.rows, self.root, background)


def check_source_flags(values: dict) -> None:
    """Refuses flags of a ControlNet script, by name in `values`, that give no or two sources or cannot go together. Raises UserError."""
    sources = [name for name in ("dataset_name", "train_data_dir", "jsonl_for_train") if values[name]]
    if len(sources) != 1:
        raise UserError(
            f"give one of --dataset_name, --train_data_dir and --jsonl_for_train, not {' and '.join(sources) or 'none'}."
        )
    if values["dataset_config_name"] and not values["dataset_name"]:
        raise UserError(
            f"--dataset_config_name {values['dataset_config_name']}: belongs to --dataset_name; leave it out."
        )
    if values["proportion_empty_prompts"] > 1.0:
        raise UserError(f"--proportion_empty_prompts {values['proportion_empty_prompts']}: a share lies in [0, 1].")
    if values["streaming"]:
        if not values["max_train_steps"]:
            raise UserError("--streaming needs --max_train_steps: the length of a stream is not known.")
        for name in ("max_train_samples", "validation_split", "aspect_ratio_buckets", "skip_bad_images"):
            if values[name]:
                raise UserError(
                    f"--{name} with --streaming: needs to know all pairs beforehand; leave one of the two out."
                )


def _title(name: str, row: int, path: Optional[str]) -> str:
    """What messages call an image: its file if it is one, otherwise its row (the path a data set embeds need not be unique)."""
    # /9j/ is also how a JPEG in base64 begins.
    file = (
        path
        and len(path) <= 4096
        and (elsewhere(path) if "://" in path else os.path.isabs(path) and not elsewhere(path))
    )
    return shown(path) if file else f"{shown(name)}[{row}]"


def load_pairs(source: Source, say: Callable[[str], None] = print) -> Pairs:
    """The train split of a data set (or its only split).

    A directory may hold parquet or arrow files, a folder of images with metadata, .tar shards in WebDataset layout, or what
    `Dataset.save_to_disk` wrote. Raises UserError for whatever cannot be read, and for columns that are not there.
    """
    dataset, columns = open_rows(source, streaming=False, say=say)
    if not len(dataset):
        raise UserError(f"{source.name}: the data set has no rows. Give one that has.")
    return Pairs(dataset, columns, source.name, root=source.root)


# ---- checking ------------------------------------------------------------------------------------


# ---- what a run trains on ------------------------------------------------------------------------


# ---- streaming -----------------------------------------------------------------------------------
