"""Rows that name image files: metadata.jsonl or .csv next to images, and .jsonl files of pairs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional
from urllib.parse import unquote

import numpy as np

from mindtune.cli import UserError, indented_list, printable, short_list
from mindtune.data.columns import JSON_COLUMNS, Columns, find_columns, no_condition
from mindtune.data.file_names import FileNames, is_inside
from mindtune.data.folder_contents import walk_files
from mindtune.data.hf_datasets import Options, dataset_from_rows
from mindtune.data.image_problems import readable_suffixes
from mindtune.data.image_sample import BASE64_IMAGE_STARTS, BASE64_TEXT, decode_base64
from mindtune.data.metadata import read_rows
from mindtune.data.text_files import SAVE_AS_UTF8, is_text_file, is_valid_text


def open_named_files(path: Path, asked: Columns, inside: bool, single: bool, options: Options) -> tuple[Any, Columns]:
    """A data set of absolute paths and captions from the rows of a .jsonl or .csv file, and its columns.

    `inside`: the rows may only name files in the directory of `path`, because the metadata came with the images. A
    file that the user names with a flag may name any files. No image is opened. Raises UserError that lists all lines
    that cannot be used, or all missing files.
    """
    import datasets

    _check_file(path, options.where)
    check = _RowCheck(path, asked, inside, single, options)
    check.run()
    columns = Columns(*(name if key else None for name, key in zip(JSON_COLUMNS, check.keys)))
    dataset = dataset_from_rows(
        _read_named_files,
        features=datasets.Features({column: datasets.Value("string") for column in columns if column}),
        arguments={
            "path": str(path.absolute()),
            "keys": tuple(check.keys),
            "inside": inside,
            "condition_optional": options.condition_optional,
        },
        digest=check.digest,
        options=options,
    )
    return dataset, columns


def _check_file(path: Path, where: str) -> None:
    if path.is_dir():
        raise UserError(f"{where}: is a directory. Give it as --train_data_dir.")
    if not path.is_file():
        raise UserError(f"{where}: no such file. Give a .jsonl file with a line for every pair.")
    if not is_text_file(path):
        raise UserError(
            f"{where}: not a text file. Give a .jsonl file with a line for every pair; give a directory of parquet or "
            "other files as --train_data_dir."
        )


class _RowCheck:
    """Reads all rows once and checks them. `run` sets `keys`, the keys of image, condition and caption, and `digest`.

    Rows and paths are kept as 8-byte hashes, so that millions of rows fit in memory.
    """

    def __init__(self, path: Path, asked: Columns, inside: bool, single: bool, options: Options) -> None:
        self.path = path
        self.asked = Columns(*(column and _short_key(column) for column in asked))
        self.inside = inside
        self.single = single
        self.options = options
        self.names = FileNames(path.absolute().parent)
        self.keys: Optional[Columns] = None
        self.all_keys: dict[str, None] = {}
        self.digest = hashlib.sha256(str(path.absolute()).encode())
        self.row_hashes = array("q")
        self.image_hashes = array("q")
        self.missing: dict[str, int] = {}  # the number of the first line that names each missing file

    def run(self) -> None:
        """Raises UserError that lists all lines that cannot be used, or all missing files. Reports repeated lines."""
        where = self.options.where
        problems = self._read()
        name = self.path.name
        if problems:
            raise UserError(
                f"{where}: {len(problems)} lines of {name} cannot be used:\n{indented_list(problems)}\n"
                "Fix or remove them."
            )
        if self.missing:
            lines = (f"{printable(image)} (line {number})" for image, number in self.missing.items())
            raise UserError(
                f"{where}: {len(self.missing)} files named in {name} are missing:\n{indented_list(lines)}\n"
                "Fix the lines."
            )
        if self.keys is None:
            example = '{"image": ..., "conditioning_image": ..., "text": ...}'
            raise UserError(f"{where}: {name} has no lines. Write {example} for every pair.")
        if repeated := len(self.row_hashes) - np.unique(np.asarray(self.row_hashes)).size:
            self.options.say(f"{where}: {repeated} lines of {name} repeat an earlier line; each is a sample of its own")
        if self.inside:
            _report_unused(self.path, self.image_hashes, self.options)
        if not self.keys.condition and not self.single:
            self.options.say(no_condition(self.all_keys, where))
        self.digest.update(repr(self.keys).encode())

    def _read(self) -> list[str]:
        """Reads all rows and returns the problems found in them."""
        problems = []
        number = 0
        try:
            for number, row in read_rows(self.path):
                try:
                    self._add(number, row)
                except ValueError as error:
                    problems.append(f"line {number}: {error}")
        except UnicodeDecodeError:
            raise UserError(
                f"{self.options.where}: {self.path.name} is not UTF-8 after line {number}. "
                f"Save the file as UTF-8 ({SAVE_AS_UTF8})."
            ) from None
        return problems

    def _add(self, number: int, row: Any) -> None:
        if isinstance(row, ValueError):
            raise row
        row = _with_short_keys(row)
        optional = self.options.condition_optional
        if self.keys is None:
            self.all_keys = _keys_of_all_rows(self.path) if optional else dict.fromkeys(row)
            self.keys = find_columns(self.all_keys, self.asked, self.options.where, self.single, optional)
        named = _resolve_row(row, self.keys, self.names, self.inside, optional)
        self.digest.update(repr(named).encode())
        self.row_hashes.append(hash(tuple(named.values())))
        for image in (named.get(JSON_COLUMNS.image), named.get(JSON_COLUMNS.condition)):
            self.image_hashes.append(hash(image))
            if image and image not in self.missing and not is_url_or_base64(image) and not os.path.isfile(image):
                self.missing[image] = number


def _report_unused(path: Path, image_hashes: array, options: Options) -> None:
    """Names the files below the directory of a metadata file that its rows do not name."""
    used = np.unique(np.asarray(image_hashes))
    readable = readable_suffixes()
    root = path.absolute().parent
    unused_images = []
    unused_others = []
    for folder, name in walk_files(root):
        file = os.path.join(folder, name)
        index = np.searchsorted(used, hash(file))
        is_used = index < len(used) and used[index] == hash(file)
        if is_used or file == str(path.absolute()) or name.endswith(".md"):
            continue
        is_image = os.path.splitext(name)[1].lower() in readable
        (unused_images if is_image else unused_others).append(os.path.relpath(file, root))
    if unused_others:
        count = len(unused_others)
        options.say(f"{options.where}: {count} files next to {path.name} are not used: {short_list(unused_others)}")
    if unused_images:
        count = len(unused_images)
        reason = f"because {path.name} does not name them"
        options.say(f"{options.where}: {count} images are not used, {reason}: {short_list(unused_images)}")


# ---- rows ----------------------------------------------------------------------------------------


def _short_key(key: str) -> str:
    """The keys image_file_name and file_name, which folders of images use, mean the same as image."""
    if key == "file_name":
        return JSON_COLUMNS.image
    suffix = "_file_name"
    return key[: -len(suffix)] if key.endswith(suffix) else key


def _with_short_keys(row: dict) -> dict:
    """The row by its short keys; a usual key in upper case is there in lower case too."""
    row = {_short_key(key): value for key, value in row.items()}
    lower_case = {key: _short_key(key.lower()) for key in row if key.lower() != key}
    if not lower_case:
        return row
    return {**{lower: row[key] for key, lower in lower_case.items() if lower in JSON_COLUMNS}, **row}


def _keys_of_all_rows(path: Path) -> dict[str, None]:
    """The short keys of all rows: the first ones may lack the condition."""
    keys: dict[str, None] = {}
    with contextlib.suppress(UnicodeDecodeError):  # which is reported when the rows are checked
        for _, row in read_rows(path):
            if not isinstance(row, ValueError):
                keys.update(dict.fromkeys(_with_short_keys(row)))
    return keys


def is_url_or_base64(cell: str) -> bool:
    """Whether a cell is a URL of another machine, or holds the image itself in base64."""
    return ("://" in cell and not cell.startswith("file:")) or decode_base64(cell) is not None


def _resolve_row(
    row: dict, keys: tuple, names: FileNames, inside: bool, condition_optional: bool
) -> dict[str, Optional[str]]:
    """The row by the names of JSON_COLUMNS, with absolute paths. `keys` are its keys of image, condition and caption.

    Raises ValueError for a missing key, a value that is not text, lone surrogates, and with `inside` for files
    outside the directory of `names`. With `condition_optional` the key of the condition may be missing.
    """
    image_key, condition_key, caption_key = keys
    if condition_optional and condition_key not in row:
        keys = (image_key, caption_key)
    needed = [key for key in keys if key]
    if missing := [key for key in needed if key not in row]:
        raise ValueError(f"lacks {', '.join(missing)}; has {printable(', '.join(row)) or 'no keys'}")
    if wrong := [key for key in needed if not isinstance(row[key], (str, type(None)))]:
        raise ValueError("; ".join(f"{key} is {printable(repr(row[key]), 120)}, not text" for key in wrong))
    if invalid := [key for key in needed if row[key] and not is_valid_text(row[key])]:
        raise ValueError(f"{invalid[0]} is {printable(repr(row[invalid[0]]), 120)}, which is not valid text")
    resolved = {}
    if image_key:
        resolved[JSON_COLUMNS.image] = _resolve_path(row[image_key], names, inside)
    if condition_key:
        resolved[JSON_COLUMNS.condition] = _resolve_path(row.get(condition_key), names, inside)
    if caption_key:
        resolved[JSON_COLUMNS.caption] = row[caption_key]
    return resolved


def _resolve_path(cell: Optional[str], names: FileNames, inside: bool) -> Optional[str]:
    """The absolute path of a file that a cell names; URLs and base64 unchanged."""
    if not cell:
        return None
    if cell[:6].lower() == "file:/":
        cell = "/" + unquote(cell[5:]).lstrip("/")
    scheme, separator, rest = cell.partition("://")
    if separator:
        cell = scheme.lower() + separator + rest
    if is_url_or_base64(cell):
        return cell
    found = names.find(cell)
    is_base64 = cell.startswith("data:") or (cell.startswith(BASE64_IMAGE_STARTS) and BASE64_TEXT.match(cell))
    if found is None and is_base64:
        raise ValueError(f"{printable(cell, 120)} is base64 that is damaged or truncated")
    if inside and not is_inside(found or names.relative_to_root(cell.replace("\\", "/"))):
        raise ValueError(f"{printable(cell)} is outside the directory")
    if found is None and not inside and os.path.isfile(cell):
        return os.path.abspath(cell)
    return str(names.root / (found or cell))


def _read_named_files(path: str, keys: tuple, inside: bool, condition_optional: bool) -> Iterator[dict]:
    names = FileNames(Path(path).parent)
    for _, row in read_rows(Path(path)):
        if isinstance(row, ValueError):
            raise row
        yield _resolve_row(_with_short_keys(row), keys, names, inside, condition_optional)
