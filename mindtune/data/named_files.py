"""Rows that name files: metadata.jsonl or .csv beside images, and .jsonl files of pairs; checked whole, no image opened."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional
from urllib.parse import unquote

import numpy as np

from mindtune.cli import UserError, few, listing, shown
from mindtune.data.columns import JSON_COLUMNS, Columns, find_columns
from mindtune.data.folders import files_below
from mindtune.data.image_problems import readable_suffixes
from mindtune.data.image_sample import BASE64, BASE64_IMAGES, from_base64
from mindtune.data.metadata import SAVE_AS_UTF8, Names, is_text, is_text_file, rows, stays


def named_files(
    path: Path,
    where: str,
    asked: Columns,
    cache_dir: Optional[str],
    streaming: bool,
    inside: bool,
    single: bool,
    say: Callable,
) -> tuple[Any, Columns]:
    """A data set of strings from the rows of a .jsonl or .csv file, checked: absolute paths and captions. No image is opened.

    A folder's own metadata came with its images and names those `inside` alone; a file that the user named may name any.
    """
    import datasets

    keys, digest = _check_rows(path, where, asked, inside, single, say)
    columns = Columns(*(name if key else None for name, key in zip(JSON_COLUMNS, keys)))
    features = datasets.Features({column: datasets.Value("string") for column in columns if column})
    arguments = {"path": str(path.absolute()), "keys": tuple(keys), "inside": inside}
    return from_rows(_named_rows, features, arguments, digest, cache_dir, streaming), columns


def _check_rows(
    path: Path, where: str, asked: Columns, inside: bool, single: bool, say: Callable[[str], None]
) -> tuple[Columns, Any]:
    """The keys of the rows and a digest of them. Raises UserError listing all bad lines, or else all missing files."""
    if path.is_dir():
        raise UserError(f"{where}: is a directory. Give it as --train_data_dir.")
    if not path.is_file():
        raise UserError(f"{where}: no such file. Give a .jsonl file with a line for every pair.")
    if not is_text_file(path):
        hint = "Give a .jsonl file with a line for every pair; a directory of parquet or other files is given as --train_data_dir."
        raise UserError(f"{where}: not a text file. {hint}")
    digest, keys, bad, absent, number = hashlib.sha256(str(path.absolute()).encode()), None, [], {}, 0
    names, seen, used = Names(path.absolute().parent), array("q"), array("q")
    try:
        for number, line in rows(path):
            try:
                if isinstance(line, ValueError):
                    raise line
                row = _short_row(line)
                keys = keys or find_columns(
                    dict.fromkeys(row), Columns(*(column and _short(column) for column in asked)), where, single
                )
                found = _named_row(row, keys, names, inside)
            except ValueError as error:
                bad.append(f"line {number}: {error}")
                continue
            digest.update(repr(found).encode())
            seen.append(hash(tuple(found.values())))
            for image in (found.get("image"), found.get("conditioning_image")):
                used.append(hash(image))
                if image and image not in absent and not elsewhere(image) and not os.path.isfile(image):
                    absent[image] = number
    except UnicodeDecodeError:
        raise UserError(
            f"{where}: {path.name} is not UTF-8 after line {number}. Save the file as UTF-8 ({SAVE_AS_UTF8})."
        ) from None
    if bad:
        raise UserError(
            f"{where}: {len(bad)} lines of {path.name} cannot be used:\n{listing(bad)}\nMend or remove them."
        )
    if absent:
        lines = (f"{shown(image)} (line {number})" for image, number in absent.items())
        raise UserError(
            f"{where}: {len(absent)} files named in {path.name} are missing:\n{listing(lines)}\nMend the lines."
        )
    if keys is None:
        raise UserError(
            f'{where}: {path.name} has no lines. Write {{"image": ..., "conditioning_image": ..., "text": ...}} for every pair.'
        )
    if repeats := len(seen) - np.unique(np.asarray(seen)).size:
        say(f"{where}: {repeats} lines of {path.name} say the same as another; each counts")
    if inside:
        _say_unnamed(path, used, where, say)
    digest.update(repr(keys).encode())
    return keys, digest


def _say_unnamed(path: Path, used: array, where: str, say: Callable[[str], None]) -> None:
    """Names what is below the directory of metadata and is not used: images that no row names, and other files."""
    hashes, readable, unnamed, others = np.unique(np.asarray(used)), readable_suffixes(), [], []
    for folder, name in files_below(path.absolute().parent):
        file = os.path.join(folder, name)
        place = np.searchsorted(hashes, hash(file))
        if (
            (place < len(hashes) and hashes[place] == hash(file))
            or file == str(path.absolute())
            or name.endswith(".md")
        ):
            continue
        kind = unnamed if os.path.splitext(name)[1].lower() in readable else others
        kind.append(os.path.relpath(file, path.absolute().parent))
    if others:
        say(f"{where}: {len(others)} files are not used beside {path.name}: {few(others)}")
    if unnamed:
        say(f"{where}: {len(unnamed)} images are not used, for {path.name} does not name them: {few(unnamed)}")


def _short(key: str) -> str:
    """image_file_name and file_name, as folders of images call it, and image are one key."""
    return "image" if key == "file_name" else key[: -len("_file_name")] if key.endswith("_file_name") else key


def _short_row(line: dict) -> dict:
    """The row by short keys, and its usual ones in small letters too."""
    row = {_short(key): value for key, value in line.items()}
    usual = {key: _short(key.lower()) for key in row if key.lower() != key}
    return {**{small: row[key] for key, small in usual.items() if small in JSON_COLUMNS}, **row} if usual else row


def elsewhere(cell: str) -> bool:
    """Whether a cell is a URL of another machine, or the image itself as base64."""
    return ("://" in cell and not cell.startswith("file:")) or from_base64(cell) is not None


def _named_row(row: dict, keys: tuple, names: Names, inside: bool) -> dict[str, Optional[str]]:
    """The row under the names of JSON_COLUMNS, paths taken from the directory of `names`; `inside`: and not out of it.

    Raises ValueError for a lacking key, another type, half a character, or a path that leads out.
    """
    wanted = [key for key in keys if key]
    if lacking := [key for key in wanted if key not in row]:
        raise ValueError(f"lacks {', '.join(lacking)}; has {shown(', '.join(row)) or 'no keys'}")
    if wrong := [
        f"{key} is {shown(repr(row[key]), 120)}, not text"
        for key in wanted
        if not isinstance(row[key], (str, type(None)))
    ]:
        raise ValueError("; ".join(wrong))
    if half := [key for key in wanted if row[key] and not is_text(row[key])]:
        raise ValueError(f"{half[0]} is {shown(repr(row[half[0]]), 120)}, which is no text")
    found = {column: _place(row[key], names, inside) for column, key in zip(JSON_COLUMNS[:2], keys) if key}
    return {**found, JSON_COLUMNS.caption: row[keys[2]]} if keys[2] else found


def _place(cell: Optional[str], names: Names, inside: bool) -> Optional[str]:
    if not cell:
        return None
    if cell[:6].lower() == "file:/":
        cell = "/" + unquote(cell[5:]).lstrip("/")
    scheme, colon, rest = cell.partition("://")
    cell = scheme.lower() + colon + rest if colon else cell
    if elsewhere(cell):
        return cell
    found = names.find(cell)
    if found is None and (cell.startswith("data:") or (cell.startswith(BASE64_IMAGES) and BASE64.match(cell))):
        raise ValueError(f"{shown(cell, 120)} is base64 that is damaged or cut off")
    if inside and not stays(found or names.from_root(cell.replace("\\", "/"))):
        raise ValueError(f"{shown(cell)} leads out of the directory")
    if found is None and not inside and os.path.isfile(cell):
        return os.path.abspath(cell)
    return str(names.root / (found or cell))


def _named_rows(path: str, keys: tuple, inside: bool) -> Iterator[dict]:
    names = Names(Path(path).parent)
    for _, line in rows(Path(path)):
        if isinstance(line, ValueError):
            raise line
        yield _named_row(_short_row(line), keys, names, inside)


def from_rows(rows: Any, features: Any, arguments: dict, digest: Any, cache_dir: Optional[str], streaming: bool) -> Any:
    """A data set of what `rows(**arguments)` yields: streamed, or memory mapped from a file of the cache that is named by `digest`."""
    import datasets

    if streaming:
        return datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs=arguments)
    options = {
        "features": features,
        "gen_kwargs": arguments,
        "cache_dir": cache_dir,
        "fingerprint": digest.hexdigest()[:32],
    }
    return datasets.Dataset.from_generator(rows, **options)
