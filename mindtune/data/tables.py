"""Data sets of rows, in every form that is read here: parquet, arrow, metadata beside images, .tar shards, a hub id.

Nothing is decoded, and a data set of any size costs the same memory: rows stay in the memory-mapped files of the `datasets` library.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

from mindtune.cli import UserError, few, listing, shown
from mindtune.data.columns import Columns, Source, find_columns
from mindtune.data.folders import files_below, is_litter
from mindtune.data.image_problems import LFS_POINTER, readable_suffixes
from mindtune.data.image_sample import Sample
from mindtune.data.metadata import is_text, metadata_file, rows
from mindtune.data.named_files import from_rows, named_files


def open_rows(
    source: Source, streaming: bool, single: bool = False, say: Callable[[str], None] = print
) -> tuple[Any, Columns]:
    """A Dataset (streaming: an IterableDataset) of the columns that are used, with undecoded images, and their names.

    `single`: of images with or without a caption, for which it need not be asked, instead of pairs. `say` is given a line for all that
    is left out. Raises UserError for whatever cannot be read, and for columns that are not there.
    """
    import datasets

    name, flag, config, cache_dir = source.name, source.flag, source.dataset_config_name, source.cache_dir
    where = f"{flag} {shown(name)}"
    asked = Columns(source.image_column, source.conditioning_image_column, source.caption_column)
    if twice := [column for column in asked if column and asked.count(column) > 1]:
        raise UserError(f"{where}: column {twice[0]} is named for two purposes. Name each column once.")
    root = Path(name).expanduser()
    if not is_text(os.path.abspath(root)):
        raise UserError(
            f"{where}: the path {shown(os.path.abspath(root))} is not UTF-8, which the datasets library needs. Rename it."
        )
    if source.train_data_dir and not root.is_dir():
        raise UserError(f"{where}: no such directory. Give the directory that holds the pairs.")
    table = None if config else _metadata(root, single)
    others = (
        sorted(name for name in os.listdir(root) if name != "train" and not is_litter(name))
        if table and table.parent != root
        else []
    )
    if others:
        say(f"{where}: only train/ is used, not {few(others)}")
    if source.jsonl_for_train or table:
        # The library reads a folder with metadata too, but dies of a row without condition, and its error names no line.
        path, inside = (root, False) if source.jsonl_for_train else (table, True)
        dataset, columns = named_files(path, where, asked, cache_dir, streaming, inside, single, say)
        if single:
            _say_captions(dict.fromkeys(next(rows(path))[1]), columns, where, say)
        return dataset, columns
    dataset = _library(root, name, where, config, cache_dir, streaming, say)
    there = dataset.features
    if lower := {column: column.lower() for column in there if column not in asked and column.lower() not in there}:
        dataset = dataset.rename_columns(lower)
    columns = find_columns(dataset.features, asked, where, single)
    if single:
        _say_captions(dataset.features, columns, where, say)
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
    bare = [f"{name}[{i}]" for i, caption in enumerate(captions) if not caption]
    if columns.caption and bare:
        own = f"{len(captions) - len(bare)} of {len(captions)} images have a caption of their own"
        say(f"{source.flag} {name}: {own}; without: {few(bare)}")
    return [
        Sample(f"{name}[{i}]", (images, i, columns.image), caption or None, root=source.root)
        for i, caption in enumerate(captions)
    ]


def _say_captions(features: dict, columns: Columns, where: str, say: Callable[[str], None]) -> None:
    """Names the column that seems to hold captions if none is used."""
    words = [name for name in ("text", "txt", "caption", "prompt") if name in features and name != columns.image]
    if words and not columns.caption:
        say(f"{where}: the column {words[0]} is not used; --caption_column {words[0]} takes captions from it")


def _library(
    root: Path, name: str, where: str, config: Optional[str], cache_dir: Optional[str], streaming: bool, say: Callable
) -> Any:
    """What the `datasets` library makes of a hub id or a directory: one split, all columns, features known."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    tars = sorted(map(str, root.glob("*.tar")))
    files = [os.path.join(*place) for place in files_below(root) if place[1].endswith((".parquet", ".arrow", ".tar"))]
    if pointers := [file for file in files if _head(file) == LFS_POINTER]:
        raise UserError(
            f"{where}: {len(pointers)} files are Git LFS pointers:\n{listing(pointers)}\nRun git lfs pull where it was cloned."
        )
    if torn := [tar for tar in tars if not _ends(tar)]:
        raise UserError(
            f"{where}: {len(torn)} of {len(tars)} shards are cut off:\n{listing(torn)}\nCopy them again, or remove them."
        )
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
            return _parquet(_split(builder.config.data_files, where, say), where, cache_dir, streaming, say)
        if not streaming:
            builder.download_and_prepare()
        found = _split(builder.as_streaming_dataset() if streaming else builder.as_dataset(), where, say)
        return (
            found if found.features is not None else found._resolve_features()
        )  # csv: known after its first rows only
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds; its text, or its cause's, is what helps
        if isinstance(error.__cause__ or error, UnicodeEncodeError):
            names = [name for name in (os.path.join(*place) for place in files_below(root)) if not is_text(name)]
            other = "Rename them. With metadata.jsonl beside them, or by --instance_data_dir, images are read under such names too."
            raise UserError(
                f"{where}: the datasets library needs names in UTF-8; {len(names)} are not: {few(names)}. {other}"
            ) from None
        reason = shown(f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else error, 1000)
        hint = "Every sample of the shards needs the same files, such as 01.image.png, 01.conditioning.png and 01.txt."
        other = "Give a directory with metadata.jsonl, parquet, arrow or .tar files, or for --dataset_name the id of a data set on the hub."
        other += " A folder of images for a LoRA is given as --instance_data_dir." if root.is_dir() else ""
        raise UserError(f"{where}: the datasets library cannot read it: {reason}\n{hint if tars else other}") from None


def _parquet(
    files: list[str], where: str, cache_dir: Optional[str], streaming: bool, say: Callable[[str], None]
) -> Any:
    """The rows of local parquet files, read in small batches: the library's own reader runs up to a gigabyte ahead of its caller.

    Columns of kinds that the library lacks, such as maps, are left out.
    """
    import datasets
    import pyarrow.parquet

    stamps = [(file, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
    schema, count, others = None, 0, []
    for path in files:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, count = schema or file.schema_arrow, count + file.metadata.num_rows
            if set(file.schema_arrow.names) != set(schema.names):
                others.append(f"{shown(path)} ({', '.join(file.schema_arrow.names)})")
    if not count:
        raise UserError(f"{where}: the data set has no rows. Give one that has.")
    if others:
        say(
            f"{where}: {len(others)} files have other columns than {files[0]} ({', '.join(schema.names)}), whose are used: {few(others)}"
        )
    for name in schema.names:
        try:
            datasets.features.features.generate_from_arrow_type(schema.field(name).type)
        except (ValueError, NotImplementedError):
            schema = schema.remove(schema.get_field_index(name))
    features, arguments = (
        datasets.Features.from_arrow_schema(schema),
        {"files": list(files), "columns": tuple(schema.names)},
    )
    return from_rows(_parquet_rows, features, arguments, hashlib.sha256(repr(stamps).encode()), cache_dir, streaming)


def _parquet_rows(files: list[str], columns: tuple[str, ...]) -> Iterator[dict]:
    import pyarrow.parquet

    for path in files:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=16, columns=list(columns), use_threads=False):
                yield from ({name: row.get(name) for name in columns} for row in batch.to_pylist())


def _head(file: str) -> bytes:
    """As many bytes as tell a Git LFS pointer."""
    with open(file, "rb") as opened:
        return opened.read(len(LFS_POINTER))


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
    there = (
        os.path.join(folder, name)
        for folder, name in files_below(root)
        if name not in ("dataset_infos.json", "dataset_info.json")
    )
    if unused := [
        os.path.relpath(file, root) for file in there if os.path.abspath(file) not in used and not file.endswith(".md")
    ]:
        kinds = ", ".join(sorted({os.path.splitext(file)[1] for file in used}))
        images = any(os.path.splitext(file)[1].lower() in readable_suffixes() for file in unused)
        how = (
            ". Images of every kind are read if metadata.jsonl names them, and by --instance_data_dir" if images else ""
        )
        say(f"{where}: {len(unused)} files are not used beside those read ({kinds}): {few(unused)}{how}")
