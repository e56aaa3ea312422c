"""Data sets of rows, in every form that is read here: parquet, arrow, metadata beside images, .tar shards, a hub id.

Nothing is decoded, and a data set of any size costs the same memory: rows stay in the memory-mapped files of the `datasets` library.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from mindtune.cli import UserError, few, listing, shown
from mindtune.data import Sample, from_base64
from mindtune.folders import is_litter
from mindtune.images import readable_suffixes
from mindtune.metadata import SAVE_AS_UTF8, Names, is_text, metadata_file, rows, stays


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
        return "--jsonl_for_train" if self.jsonl_for_train else "--train_data_dir" if self.train_data_dir else "--dataset_name"

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
JSON_COLUMNS = Columns("image", "conditioning_image", "text")  # what a .jsonl file is turned into, whatever its own keys


# ---- opening -----------------------------------------------------------------------------------------------------------------------


def open_rows(source: Source, streaming: bool, single: bool = False, say: Callable[[str], None] = print) -> tuple[Any, Columns]:
    """A Dataset (streaming: an IterableDataset) of the columns that are used, with undecoded images, and their names.

    `single`: of images with or without a caption, for which it need not be asked, instead of pairs. `say` is given a line for all that
    is left out. Raises UserError for whatever cannot be read, and for columns that are not there.
    """
    import datasets

    name, flag, config, cache_dir = source.name, source.flag, source.dataset_config_name, source.cache_dir
    where = f"{flag} {shown(name)}"
    asked = Columns(source.image_column, source.conditioning_image_column, source.caption_column)
    root = Path(name).expanduser()
    if not is_text(os.path.abspath(root)):
        raise UserError(f"{where}: the path {shown(os.path.abspath(root))} is not UTF-8, which the datasets library needs. Rename it.")
    if source.train_data_dir and not root.is_dir():
        raise UserError(f"{where}: no such directory. Give the directory that holds the pairs.")
    table = None if config else _metadata(root, single)
    others = sorted(name for name in os.listdir(root) if name != "train" and not is_litter(name)) if table and table.parent != root else []
    if others:
        say(f"{where}: only train/ is used, not {few(others)}")
    if source.jsonl_for_train or table:
        # The library reads a folder with metadata too, but dies of a row without condition, and its error names no line.
        path, inside = (root, False) if source.jsonl_for_train else (table, True)
        return _named_files(path, where, asked, cache_dir, streaming, inside, single, say)
    dataset = _library(root, name, where, config, cache_dir, streaming, say)
    columns = find_columns(dataset.features, asked, where, single)
    dataset = dataset.select_columns(list(dict.fromkeys(filter(None, columns))))
    for column in filter(None, columns[:2]):
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset, columns


def _metadata(root: Path, single: bool) -> Optional[Path]:
    """The file that names a directory's images, there or in train/. Beside parquet, arrow or .tar files only a metadata.jsonl of pairs."""
    found = metadata_file(root)
    if root.is_dir() and any(name.endswith((".parquet", ".arrow", ".tar")) for name in os.listdir(root)):
        return found if found and found.suffix.lower() == ".jsonl" and not single else None
    return found or metadata_file(root / "train")


def samples_in_dataset(source: Source, say: Callable[[str], None] = print) -> list[Sample]:
    """The images of a data set in its order, captions if a column is named for them. Raises UserError as `open_rows` does."""
    dataset, columns = open_rows(source, streaming=False, single=True, say=say)
    captions = dataset[columns.caption] if columns.caption else [None] * len(dataset)
    images, name = dataset.select_columns([columns.image]), shown(source.name)
    return [Sample(f"{name}[{i}]", (images, i, columns.image), caption or None, root=source.root) for i, caption in enumerate(captions)]


def _library(root: Path, name: str, where: str, config: Optional[str], cache_dir: Optional[str], streaming: bool, say: Callable) -> Any:
    """What the `datasets` library makes of a hub id or a directory: one split, all columns, features known."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    tars = sorted(map(str, root.glob("*.tar")))
    if torn := [tar for tar in tars if not _ends(tar)]:
        raise UserError(f"{where}: {len(torn)} of {len(tars)} shards are cut off:\n{listing(torn)}\nCopy them again, or remove them.")
    try:
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            found = _split(datasets.load_from_disk(str(root)), where, say)
            return found.to_iterable_dataset() if streaming else found
        if tars:
            builder = datasets.load_dataset_builder("webdataset", data_files={"train": tars}, cache_dir=cache_dir)
        else:
            builder = datasets.load_dataset_builder(str(root) if root.is_dir() else name, config, cache_dir=cache_dir)
        if root.is_dir() and builder.config.data_files:
            _say_unused(root, builder.config.data_files, where, say)
        if root.is_dir() and isinstance(builder, Parquet):
            return _parquet(_split(builder.config.data_files, where, say), cache_dir, streaming)
        if not streaming:
            builder.download_and_prepare()
        found = _split(builder.as_streaming_dataset() if streaming else builder.as_dataset(), where, say)
        return found if found.features is not None else found._resolve_features()  # csv: known after its first rows only
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds; its text, or its cause's, is what helps
        reason = shown(f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else error, 1000)
        hint = "Every sample of the shards needs the same files, such as 01.image.png, 01.conditioning.png and 01.txt."
        other = "Give a directory with metadata.jsonl, parquet, arrow or .tar files, or for --dataset_name the id of a data set on the hub."
        raise UserError(f"{where}: the datasets library cannot read it: {reason}\n{hint if tars else other}") from None


def _parquet(files: list[str], cache_dir: Optional[str], streaming: bool) -> Any:
    """The rows of local parquet files, read in small batches: the library's own reader runs up to a gigabyte ahead of its caller."""
    import datasets
    import pyarrow.parquet

    stamps = [(file, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(files[0]))
    return _from_rows(_parquet_rows, features, {"files": list(files)}, hashlib.sha256(repr(stamps).encode()), cache_dir, streaming)


def _parquet_rows(files: list[str]) -> Iterator[dict]:
    import pyarrow.parquet

    for path in files:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=16, use_threads=False):
                yield from batch.to_pylist()


def _from_rows(rows: Any, features: Any, arguments: dict, digest: Any, cache_dir: Optional[str], streaming: bool) -> Any:
    """A data set of what `rows(**arguments)` yields: streamed, or memory mapped from a file of the cache that is named by `digest`."""
    import datasets

    if streaming:
        return datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs=arguments)
    options = {"features": features, "gen_kwargs": arguments, "cache_dir": cache_dir, "fingerprint": digest.hexdigest()[:32]}
    return datasets.Dataset.from_generator(rows, **options)


def _ends(tar: str) -> bool:
    """Whether an archive has its end mark of 1024 zero bytes. The library takes one that is cut off for a shorter one."""
    with open(tar, "rb") as file:
        file.seek(max(0, os.path.getsize(tar) - 1024))
        return file.read() == bytes(1024)


def _split(found: Any, where: str, say: Callable[[str], None]) -> Any:
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) != 1:
        raise UserError(f"{where}: has no split train but {', '.join(found)}. Name or keep one of them only.")
    used = "train" if "train" in found else next(iter(found))
    if others := [name for name in found if name != used]:
        say(f"{where}: only the split {used} is used, not {', '.join(map(str, others))}")
    return found[used]


def _say_unused(root: Path, splits: dict, where: str, say: Callable[[str], None]) -> None:
    """Names the files of a directory that the library does not read: it takes those of one kind only."""
    used = {os.path.abspath(file) for files in splits.values() for file in files}
    there = (os.path.join(folder, name) for folder, name in _files(root) if name not in ("dataset_infos.json", "dataset_info.json"))
    if unused := [os.path.relpath(file, root) for file in there if os.path.abspath(file) not in used and not file.endswith(".md")]:
        kinds = ", ".join(sorted({os.path.splitext(file)[1] for file in used}))
        say(f"{where}: {len(unused)} files are not used beside those read ({kinds}): {few(unused)}")


def _files(root: Path) -> Iterator[tuple[str, str]]:
    """(folder, name) of every file below `root`, in order of names, without what systems leave there."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from ((folder, name) for name in sorted(files) if not is_litter(name) and not name.endswith(".lock"))


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
    condition = None if single else asked.condition or _first(others, ("conditioning_image",), ("conditioning.", "condition"))
    others = [column for column in features if column != condition]
    typed = [column for column in others if _kind(features[column]) == "Image"]
    image = asked.image or _first(typed if single and typed else others, ("image", "jpg", "png", "jpeg", "webp"), ("image.",))
    image = image or next(iter(typed), None)
    found = Columns(image, condition, asked.caption or (None if single else _first(others, ("text", "txt", "caption", "prompt"), ())))
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
    """How messages call a column's kind. A struct of bytes and path is an image whose file forgot to say so."""
    if feature is None or isinstance(feature, dict):
        return feature and ("Image" if {"bytes", "path"} <= set(feature) else "a struct")
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__


# ---- rows that name files ----------------------------------------------------------------------------------------------------------


def _named_files(
    path: Path, where: str, asked: Columns, cache_dir: Optional[str], streaming: bool, inside: bool, single: bool, say: Callable
) -> tuple[Any, Columns]:
    """A data set of strings from the rows of a .jsonl or .csv file, checked: absolute paths and captions. No image is opened.

    A folder's own metadata came with its images and names those `inside` alone; a file that the user named may name any.
    """
    import datasets

    keys, digest = _check_rows(path, where, asked, inside, single, say)
    columns = Columns(*(name if key else None for name, key in zip(JSON_COLUMNS, keys)))
    features = datasets.Features({column: datasets.Value("string") for column in columns if column})
    arguments = {"path": str(path.absolute()), "keys": tuple(keys), "inside": inside}
    return _from_rows(_named_rows, features, arguments, digest, cache_dir, streaming), columns


def _check_rows(path: Path, where: str, asked: Columns, inside: bool, single: bool, say: Callable[[str], None]) -> tuple[Columns, Any]:
    """The keys of the rows and a digest of them. Raises UserError listing all bad lines, or else all missing files."""
    if not path.is_file():
        raise UserError(f"{where}: no such file. Give a .jsonl file with a line for every pair.")
    digest, keys, bad, absent, number = hashlib.sha256(str(path.absolute()).encode()), None, [], {}, 0
    names, seen, used = Names(path.absolute().parent), array("q"), array("q")
    try:
        for number, line in rows(path):
            try:
                if isinstance(line, ValueError):
                    raise line
                row = {_short(key): value for key, value in line.items()}
                keys = keys or find_columns(dict.fromkeys(row), Columns(*(column and _short(column) for column in asked)), where, single)
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
        raise UserError(f"{where}: {path.name} is not UTF-8 after line {number}. Save the file as UTF-8 ({SAVE_AS_UTF8}).") from None
    if bad:
        raise UserError(f"{where}: {len(bad)} lines of {path.name} cannot be used:\n{listing(bad)}\nMend or remove them.")
    if absent:
        lines = (f"{shown(image)} (line {number})" for image, number in absent.items())
        raise UserError(f"{where}: {len(absent)} files named in {path.name} are missing:\n{listing(lines)}\nMend the lines.")
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
    for folder, name in _files(path.absolute().parent):
        file = os.path.join(folder, name)
        if os.path.splitext(name)[1].lower() in readable:
            place = np.searchsorted(hashes, hash(file))
            if place == len(hashes) or hashes[place] != hash(file):
                unnamed.append(os.path.relpath(file, path.absolute().parent))
        elif file != str(path.absolute()) and not name.endswith(".md"):
            others.append(os.path.relpath(file, path.absolute().parent))
    if others:
        say(f"{where}: {len(others)} files are not used beside {path.name}: {few(others)}")
    if unnamed:
        say(f"{where}: {len(unnamed)} images are not used, for {path.name} does not name them: {few(unnamed)}")


def _short(key: str) -> str:
    """image_file_name and file_name, as folders of images call it, and image are one key."""
    return "image" if key == "file_name" else key[: -len("_file_name")] if key.endswith("_file_name") else key


def elsewhere(cell: str) -> bool:
    """Whether a cell is a URL of another machine, or the image itself as base64."""
    return ("://" in cell and not cell.startswith("file:")) or (len(cell) > 255 and from_base64(cell) is not None)


def _named_row(row: dict, keys: tuple, names: Names, inside: bool) -> dict[str, Optional[str]]:
    """The row under the names of JSON_COLUMNS, paths taken from the directory of `names`; `inside`: and not out of it.

    Raises ValueError for a lacking key, another type, half a character, or a path that leads out.
    """
    wanted = [key for key in keys if key]
    if lacking := [key for key in wanted if key not in row]:
        raise ValueError(f"lacks {', '.join(lacking)}; has {shown(', '.join(row)) or 'no keys'}")
    if wrong := [f"{key} is {shown(repr(row[key]), 120)}, not text" for key in wanted if not isinstance(row[key], (str, type(None)))]:
        raise ValueError("; ".join(wrong))
    if half := [key for key in wanted if row[key] and not is_text(row[key])]:
        raise ValueError(f"{half[0]} is {shown(repr(row[half[0]]), 120)}, which is no text")
    found = {column: _place(row[key], names, inside) for column, key in zip(JSON_COLUMNS[:2], keys) if key}
    return {**found, JSON_COLUMNS.caption: row[keys[2]]} if keys[2] else found


def _place(cell: Optional[str], names: Names, inside: bool) -> Optional[str]:
    if not cell or elsewhere(cell):
        return cell or None
    found = names.find(cell)
    if inside and not (stays(found) if found else stays(cell.replace("\\", "/"))):
        raise ValueError(f"{shown(cell)} leads out of the directory")
    return str(names.root / (found or cell))


def _named_rows(path: str, keys: tuple, inside: bool) -> Iterator[dict]:
    names = Names(Path(path).parent)
    for _, line in rows(Path(path)):
        if isinstance(line, ValueError):
            raise line
        yield _named_row({_short(key): value for key, value in line.items()}, keys, names, inside)
