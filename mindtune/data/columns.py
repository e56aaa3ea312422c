"""Where rows come from and which of their columns are the image, the condition and the caption."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mindtune.cli import UserError


class Columns(NamedTuple):
    """The names of a data set's three columns."""

    image: Optional[str] = None
    condition: Optional[str] = None
    caption: Optional[str] = None


class Source(NamedTuple):
    """Where rows come from, by the names of the scripts' flags: exactly one of name, directory and .jsonl file, and its columns."""

    dataset_name: Optional[str] = None
    dataset_config_name: Optional[str] = None
    train_data_dir: Optional[str] = None
    jsonl_for_train: Optional[str] = None
    cache_dir: Optional[str] = None
    image_column: Optional[str] = None
    conditioning_image_column: Optional[str] = None
    caption_column: Optional[str] = None

    @property
    def name(self) -> str:
        return self.jsonl_for_train or self.train_data_dir or self.dataset_name

    @property
    def flag(self) -> str:
        return (
            "--jsonl_for_train"
            if self.jsonl_for_train
            else "--train_data_dir"
            if self.train_data_dir
            else "--dataset_name"
        )

    @property
    def root(self) -> Optional[str]:
        """The directory that paths in its cells are relative to; None for a file or a hub id."""
        root = Path(self.name).expanduser()
        return str(root) if root.is_dir() else None


FLAGS = Columns("--image_column", "--conditioning_image_column", "--caption_column")
# What the library makes of folders of images or texts without metadata has other columns than were meant.
FOLDER_HINTS = (
    ' Pairs of files are named in metadata.jsonl: {"file_name": ..., "conditioning_image_file_name": ..., "text": ...} in each line.',
    " A folder of images with caption files is given as --instance_data_dir.",
)
JSON_COLUMNS = Columns(
    "image", "conditioning_image", "text"
)  # what a .jsonl file is turned into, whatever its own keys


def find_columns(features: dict, asked: Columns, where: str, single: bool = False) -> Columns:
    """The columns of target, condition and caption: the asked ones, or by the usual names. `features`: a column's kind, or None.

    `single`: the image's, and the caption's only if asked for.

    Raises UserError naming the columns there are if one is missing or holds something else.
    """
    there = f"{where} has the columns {', '.join(features)}"
    for flag, column in zip(FLAGS, asked):
        if column and column not in features:
            raise UserError(f"{flag} {column}: {there}. Name one of them.")
    others = [column for column in features if column != asked.image]
    condition = (
        None if single else asked.condition or _first(others, ("conditioning_image",), ("conditioning.", "condition"))
    )
    others = [column for column in features if column != condition]
    typed = [column for column in others if _kind(features[column]) == "Image"]
    names = ("image", "jpg", "png", "jpeg", "webp", "heic", "heif", "avif")
    image = asked.image or _first(typed if single and typed else others, names, ("image.",))
    image = image or next(iter(typed), None)
    found = Columns(
        image,
        condition,
        asked.caption or (None if single else _first(others, ("text", "txt", "caption", "prompt"), ())),
    )
    for flag, column, what in zip(FLAGS, found, ("images", "images", "text")):
        if column is None and single and flag != FLAGS.image:
            continue
        if column is None:
            hint = FOLDER_HINTS[single] if set(features) <= {"image", "label", "text"} else ""
            raise UserError(f"{flag}: {there}; none has a known name. Name the one to use with {flag}.{hint}")
        kind, fitting = _kind(features[column]), ("string", "large_string", "string_view")
        if what == "images":
            fitting += ("binary", "large_binary", "Image")
        if kind and kind not in fitting:
            raise UserError(f"{flag} {column}: holds {kind}, not {what}. {there}. Name another with {flag}.")
    return found


def _first(columns: Iterable[str], names: tuple[str, ...], prefixes: tuple[str, ...]) -> Optional[str]:
    exact = [name for name in names if name in columns]
    return next(iter(exact + [column for prefix in prefixes for column in columns if column.startswith(prefix)]), None)


def _kind(feature: Any) -> Optional[str]:
    """How messages call a column's kind. A struct with bytes is an image whose file forgot to say so."""
    if feature is None or isinstance(feature, dict):
        return feature and ("Image" if "bytes" in feature else "a struct")
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__
