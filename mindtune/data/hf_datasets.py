"""Opens data sets with the `datasets` library, with clear errors, and reads local parquet files in little memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from mindtune.cli import UserError, indented_list, printable, short_list
from mindtune.data.folder_contents import walk_files
from mindtune.data.image_problems import LFS_POINTER, readable_suffixes
from mindtune.data.text_files import is_valid_text


class Options(NamedTuple):
    """How to open a data set. `where` starts the messages; `say` receives a line for everything that is not used.

    `condition_optional` is that of `Source`.
    """

    where: str
    cache_dir: Optional[str]
    streaming: bool
    say: Callable[[str], None]
    condition_optional: bool = False


def dataset_from_rows(generate: Callable, features: Any, arguments: dict, digest: Any, options: Options) -> Any:
    """A data set of the rows that `generate(**arguments)` yields.

    It is streamed, or memory-mapped from a file in the cache that `digest` names.
    """
    import datasets

    if options.streaming:
        return datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs=arguments)
    return datasets.Dataset.from_generator(
        generate,
        features=features,
        gen_kwargs=arguments,
        cache_dir=options.cache_dir,
        fingerprint=digest.hexdigest()[:32],
    )


def open_dataset(root: Path, name: str, config: Optional[str], options: Options) -> Any:
    """The training split of a hub id or a directory, with all columns, whose features are known.

    `root` is the path of the data set if it is a directory. Raises UserError if the library cannot read it.
    """
    where = options.where
    shards = sorted(map(str, root.glob("*.tar")))
    _check_files(root, shards, where)
    try:
        return _open(root, name, config, shards, options)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds; the text of the error or of its cause explains it
        if isinstance(error.__cause__ or error, UnicodeEncodeError):
            paths = (os.path.join(*place) for place in walk_files(root))
            invalid = [path for path in paths if not is_valid_text(path)]
            raise UserError(
                f"{where}: the datasets library needs file names in UTF-8; {len(invalid)} are not: "
                f"{short_list(invalid)}. Rename them, or name the images in a metadata.jsonl next to them, or give the "
                "folder as --instance_data_dir."
            ) from None
        cause = error.__cause__
        reason = printable(f"{type(cause).__name__}: {cause}" if cause else error, 1000)
        hint = _hint_for_shards() if shards else _hint_for_directories(root)
        raise UserError(f"{where}: the datasets library cannot read it: {reason}\n{hint}") from None


def _check_files(root: Path, shards: list[str], where: str) -> None:
    """Raises UserError for Git LFS pointers and truncated shards, which the library misreads."""
    files = [os.path.join(*place) for place in walk_files(root) if place[1].endswith((".parquet", ".arrow", ".tar"))]
    if pointers := [file for file in files if _read_start(file) == LFS_POINTER]:
        raise UserError(
            f"{where}: {len(pointers)} files are Git LFS pointers:\n{indented_list(pointers)}\n"
            "Run git lfs pull where it was cloned."
        )
    if truncated := [shard for shard in shards if not _has_end_mark(shard)]:
        raise UserError(
            f"{where}: {len(truncated)} of {len(shards)} shards are truncated:\n{indented_list(truncated)}\n"
            "Copy them again, or remove them."
        )


def _open(root: Path, name: str, config: Optional[str], shards: list[str], options: Options) -> Any:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        saved = _training_split(datasets.load_from_disk(str(root)), options)
        return saved.to_iterable_dataset() if options.streaming else saved
    cache_dir = options.cache_dir
    if shards:
        builder = datasets.load_dataset_builder("webdataset", data_files={"train": shards}, cache_dir=cache_dir)
    else:
        builder = datasets.load_dataset_builder(str(root) if root.is_dir() else name, config, cache_dir=cache_dir)
    if root.is_dir() and builder.config.data_files:
        _report_unused(root, builder.config.data_files, options)
    if root.is_dir() and isinstance(builder, Parquet):
        return _open_parquet(_training_split(builder.config.data_files, options), options)
    if options.streaming:
        found = _training_split(builder.as_streaming_dataset(), options)
    else:
        builder.download_and_prepare()
        found = _training_split(builder.as_dataset(), options)
    # The features of a streamed .csv file are known only after its first rows.
    return found if found.features is not None else found._resolve_features()


def _hint_for_shards() -> str:
    return "Every sample of the shards needs the same files, such as 01.image.png, 01.conditioning.png and 01.txt."


def _hint_for_directories(root: Path) -> str:
    hint = (
        "Give a directory with metadata.jsonl, parquet, arrow or .tar files, or for --dataset_name the id of a data "
        "set on the hub."
    )
    return f"{hint} Give a folder of images for a LoRA as --instance_data_dir." if root.is_dir() else hint


def _read_start(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(len(LFS_POINTER))


def _has_end_mark(tar: str) -> bool:
    """Whether an archive ends with 1024 zero bytes. Without them it is truncated, which the library does not notice."""
    with open(tar, "rb") as file:
        file.seek(max(0, os.path.getsize(tar) - 1024))
        return file.read() == bytes(1024)


def _training_split(splits: Any, options: Options) -> Any:
    """The split "train" of a dictionary of splits, or the only one; anything else unchanged."""
    if not isinstance(splits, dict):
        return splits
    if "train" not in splits and len(splits) != 1:
        raise UserError(f"{options.where}: has the splits {', '.join(splits)}, not train. Keep one, or name it train.")
    used = "train" if "train" in splits else next(iter(splits))
    if others := [name for name in splits if name != used]:
        options.say(f"{options.where}: only the split {used} is used, not {', '.join(map(str, others))}")
    return splits[used]


def _report_unused(root: Path, splits: dict, options: Options) -> None:
    """Names the files of a directory that the library does not read: it reads files of one format only."""
    used = {os.path.abspath(file) for files in splits.values() for file in files}
    unused = []
    for folder, name in walk_files(root):
        path = os.path.join(folder, name)
        is_description = name in ("dataset_infos.json", "dataset_info.json") or name.endswith(".md")
        if not is_description and os.path.abspath(path) not in used:
            unused.append(os.path.relpath(path, root))
    if not unused:
        return
    formats = ", ".join(sorted({os.path.splitext(file)[1] for file in used}))
    holds_images = any(os.path.splitext(file)[1].lower() in readable_suffixes() for file in unused)
    hint = (
        ". Images of all formats are read if metadata.jsonl names them, and by --instance_data_dir"
        if holds_images
        else ""
    )
    options.say(
        f"{options.where}: {len(unused)} files are not used; those used end in {formats}: {short_list(unused)}{hint}"
    )


# ---- parquet -------------------------------------------------------------------------------------


def _open_parquet(files: list[str], options: Options) -> Any:
    """The rows of local parquet files, read in small batches. The library's own reader buffers up to a gigabyte.

    The columns are those of the first file, without those of types that the library lacks, such as maps.
    """
    import datasets
    import pyarrow.parquet

    # Part of the name of the file in the cache: a changed parquet file is read again.
    stamps = [(file, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
    schema = None
    count = 0
    different = []
    for path in files:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = schema or file.schema_arrow
            count += file.metadata.num_rows
            if set(file.schema_arrow.names) != set(schema.names):
                different.append(f"{printable(path)} ({', '.join(file.schema_arrow.names)})")
    if not count:
        raise UserError(f"{options.where}: the data set has no rows. Give one that has.")
    if different:
        columns = f"{files[0]} ({', '.join(schema.names)})"
        options.say(
            f"{options.where}: {len(different)} files have other columns than {columns}; the columns of that file are "
            f"used: {short_list(different)}"
        )
    for name in schema.names:
        if not _is_supported_type(schema.field(name).type):
            schema = schema.remove(schema.get_field_index(name))
    return dataset_from_rows(
        _read_parquet,
        features=datasets.Features.from_arrow_schema(schema),
        arguments={"files": list(files), "columns": tuple(schema.names)},
        digest=hashlib.sha256(repr(stamps).encode()),
        options=options,
    )


def _is_supported_type(arrow_type: Any) -> bool:
    """Whether the library has a feature type for a type of pyarrow. It raises ValueError for those that it lacks."""
    from datasets.features.features import generate_from_arrow_type

    try:
        generate_from_arrow_type(arrow_type)
    except ValueError:
        return False
    return True


def _read_parquet(files: list[str], columns: tuple[str, ...]) -> Iterator[dict]:
    import pyarrow.parquet

    for path in files:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=16, columns=list(columns), use_threads=False):
                yield from ({name: row.get(name) for name in columns} for row in batch.to_pylist())
