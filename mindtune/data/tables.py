"""Opens data sets of rows in every supported form: parquet, arrow, metadata with images, .tar shards, a hub id.

No image is decoded. The rows stay in the memory-mapped files of the `datasets` library, so a data set of any size
needs the same memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Callable, Optional

from mindtune.cli import UserError, printable, short_list
from mindtune.data.columns import CAPTION_COLUMN_NAMES, Columns, Source, check_hub, find_columns, no_condition
from mindtune.data.folder_contents import is_hidden_or_system_file
from mindtune.data.hf_datasets import Options, open_dataset
from mindtune.data.image_sample import Sample
from mindtune.data.metadata import metadata_file, read_rows
from mindtune.data.named_files import open_named_files
from mindtune.data.text_files import is_valid_text


def open_rows(
    source: Source, streaming: bool, single: bool = False, say: Callable[[str], None] = print
) -> tuple[Any, Columns]:
    """A Dataset (an IterableDataset if `streaming`) of the used columns, with encoded images, and the columns' names.

    `single`: the data set holds images instead of pairs, and captions only if a column is named for them. `say`
    receives a line for everything that is not used. Raises UserError for what cannot be read and for missing columns.
    """
    _hide_bars()
    where = f"{source.flag} {printable(source.name)}"
    asked = Columns(source.image_column, source.conditioning_image_column, source.caption_column)
    root = Path(source.name).expanduser()
    _check_source(source, asked, root, where)
    table = None if source.dataset_config_name else _find_metadata(root, single)
    if table and table.parent != root:
        others = sorted(name for name in os.listdir(root) if name != "train" and not is_hidden_or_system_file(name))
        if others:
            say(f"{where}: only train/ is used, not {short_list(others)}")
    options = Options(where, source.cache_dir, streaming, say, source.condition_optional)
    # The `datasets` library reads folders with metadata too. But it fails at a row without a condition, without
    # naming the line.
    rows_file = root if source.jsonl_for_train else table
    if rows_file:
        inside = not source.jsonl_for_train
        dataset, columns = open_named_files(rows_file, asked, inside=inside, single=single, options=options)
        features = dict.fromkeys(next(read_rows(rows_file))[1])
    else:
        dataset, columns = _open_columns(root, source, asked, single, options)
        features = dataset.features
        dataset = _keep_columns(dataset, columns)
    if single:
        _report_unused_captions(features, columns, options)
    return dataset, columns


def _hide_bars() -> None:
    """Where stderr is no terminal, the datasets library would print a line for every change of its bars."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _check_source(source: Source, asked: Columns, root: Path, where: str) -> None:
    check_hub(source.dataset_name, source.hub)
    if repeated := [column for column in asked if column and asked.count(column) > 1]:
        raise UserError(f"{where}: column {repeated[0]} is named for two purposes. Name each column once.")
    absolute = os.path.abspath(root)
    if not is_valid_text(absolute):
        raise UserError(
            f"{where}: the path {printable(absolute)} is not UTF-8, which the datasets library needs. Rename it."
        )
    if source.train_data_dir and not root.is_dir():
        raise UserError(f"{where}: no such directory. Give the directory that holds the pairs.")


def _find_metadata(root: Path, single: bool) -> Optional[Path]:
    """The metadata file of a directory or of its subfolder train/.

    Next to parquet, arrow or .tar files only a metadata.jsonl of pairs counts.
    """
    found = metadata_file(root)
    if root.is_dir() and any(name.endswith((".parquet", ".arrow", ".tar")) for name in os.listdir(root)):
        return found if found and found.suffix.lower() == ".jsonl" and not single else None
    return found or metadata_file(root / "train")


def _open_columns(root: Path, source: Source, asked: Columns, single: bool, options: Options) -> tuple[Any, Columns]:
    """The data set with all of its columns, their names in lower case, and the columns to use."""
    dataset = open_dataset(root, source.name, source.dataset_config_name, options)
    names = dataset.features
    lower_case = {name: name.lower() for name in names if name not in asked and name.lower() not in names}
    if lower_case:
        dataset = dataset.rename_columns(lower_case)
    columns = find_columns(dataset.features, asked, options.where, single, options.condition_optional)
    if not columns.condition and not single:
        options.say(no_condition(dataset.features, options.where))
    return dataset, columns


def _keep_columns(dataset: Any, columns: Columns) -> Any:
    """The data set with only `columns`, its images encoded."""
    import datasets

    dataset = dataset.select_columns(list(dict.fromkeys(filter(None, columns))))
    for column in (columns.image, columns.condition):
        if column and isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _report_unused_captions(features: dict, columns: Columns, options: Options) -> None:
    """Names a column that seems to hold captions if no column is used for them."""
    found = [name for name in CAPTION_COLUMN_NAMES if name in features and name != columns.image]
    if found and not columns.caption:
        hint = f"add --caption_column {found[0]} to read captions from it"
        options.say(f"{options.where}: the column {found[0]} is not used; {hint}")


def samples_in_dataset(source: Source, say: Callable[[str], None] = print) -> list[Sample]:
    """The images of a data set in its order, with captions if a column is named for them. Errors as in `open_rows`."""
    dataset, columns = open_rows(source, streaming=False, single=True, say=say)
    captions = dataset[columns.caption] if columns.caption else [None] * len(dataset)
    images = dataset.select_columns([columns.image])
    masks = dataset.select_columns([columns.condition]) if columns.condition else None
    name = printable(source.name)
    without = [f"{name}[{i}]" for i, caption in enumerate(captions) if not caption]
    if columns.caption and without:
        with_caption = f"{len(captions) - len(without)} of {len(captions)} images have a caption of their own"
        say(f"{source.flag} {name}: {with_caption}; without: {short_list(without)}")
    samples = [
        Sample(f"{name}[{i}]", (images, i, columns.image), caption or None, root=source.root)
        for i, caption in enumerate(captions)
    ]
    for i, sample in enumerate(samples if masks else ()):
        sample.mask = Sample(f"the mask of {sample.name}", (masks, i, columns.condition), root=source.root)
    return samples
