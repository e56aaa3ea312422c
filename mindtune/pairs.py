"""Pairs for ControlNet training: a target picture, its condition picture and a caption; found, checked, put in order, streamed.

A data set of any size costs the same memory: rows stay in the memory-mapped files of the `datasets` library until they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from mindtune import devices
from mindtune.buckets import BucketOrder, bucket_numbers, wanted
from mindtune.cli import UserError, listing
from mindtune.data import Sample, Wanted, encoded, prefetch, report_bad, size_or_problem, split, too_small
from mindtune.rng import generator


class Pair(NamedTuple):
    """A target picture, the condition picture it is drawn from, and the caption ("" if the data set has none)."""

    image: Sample
    condition: Sample
    caption: str


class Columns(NamedTuple):
    """The names of a data set's three columns."""

    image: Optional[str] = None
    condition: Optional[str] = None
    caption: Optional[str] = None


class Source(NamedTuple):
    """Where pairs come from, by the names of the scripts' flags: exactly one of name, directory and .jsonl file, and its columns."""

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


FLAGS = Columns("--image_column", "--conditioning_image_column", "--caption_column")
JSON_COLUMNS = Columns("image", "conditioning_image", "text")  # what a .jsonl file is turned into, whatever its own keys


class Pairs:
    """A sequence of pairs over a `datasets.Dataset`: `pairs[i]` reads names and a caption, the pictures are read when opened.

    `rows` are the rows that take part (None: all). Pickles to a few kilobytes: the rows stay in the files of the data set.
    """

    def __init__(self, dataset: Any, columns: Columns, name: str, rows: Optional[np.ndarray] = None) -> None:
        self.dataset, self.columns, self.name, self.rows = dataset, columns, name, rows
        self.pictures = {column: dataset.select_columns([column]) for column in columns[:2]}
        # Paths and captions apart from the pictures' bytes, which would be read along with every row.
        flat = dataset.flatten()
        texts = {column for column, kind in flat.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")}
        self.texts = flat.select_columns(sorted(texts))

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        place = range(len(self))[index]
        row = place if self.rows is None else int(self.rows[place])
        texts = self.texts[row]
        image, condition = (
            Sample(_title(self.name, row, texts.get(f"{column}.path", texts.get(column))), (self.pictures[column], row, column))
            for column in self.columns[:2]
        )
        return Pair(image, condition, texts[self.columns.caption] or "")

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def select(self, indices: Iterable[int]) -> Pairs:
        """The pairs at `indices`, in that order. Raises IndexError for one that is not there."""
        rows = np.arange(len(self.dataset)) if self.rows is None else self.rows
        return Pairs(self.dataset, self.columns, self.name, rows[np.fromiter(indices, dtype=np.int64)])


def check_source_flags(values: dict) -> None:
    """Refuses flags of a ControlNet script, by name in `values`, that give no or two sources or cannot go together. Raises UserError."""
    sources = [name for name in ("dataset_name", "train_data_dir", "jsonl_for_train") if values[name]]
    if len(sources) != 1:
        raise UserError(f"give one of --dataset_name, --train_data_dir and --jsonl_for_train, not {' and '.join(sources) or 'none'}.")
    if values["dataset_config_name"] and not values["dataset_name"]:
        raise UserError(f"--dataset_config_name {values['dataset_config_name']}: belongs to --dataset_name; leave it out.")
    if values["proportion_empty_prompts"] > 1.0:
        raise UserError(f"--proportion_empty_prompts {values['proportion_empty_prompts']}: a share lies in [0, 1].")
    if values["streaming"]:
        if not values["max_train_steps"]:
            raise UserError("--streaming needs --max_train_steps: the length of a stream is not known.")
        for name in ("max_train_samples", "validation_split", "aspect_ratio_buckets", "skip_bad_images"):
            if values[name]:
                raise UserError(f"--{name} with --streaming: needs to know all pairs beforehand; leave one of the two out.")


def _title(name: str, row: int, path: Optional[str]) -> str:
    """What messages call a picture: its file if it is one, otherwise its row (the path a data set embeds need not be unique)."""
    return path if path and (os.path.isabs(path) or "://" in path) else f"{name}[{row}]"


def load_pairs(source: Source) -> Pairs:
    """The train split of a data set (or its only split).

    A directory may hold parquet or arrow files, a folder of pictures with metadata, .tar shards in WebDataset layout, or what
    `Dataset.save_to_disk` wrote. Raises UserError for whatever cannot be read, and for columns that are not there.
    """
    dataset, columns, name = _open(source, streaming=False)
    if not len(dataset):
        raise UserError(f"{name}: the data set has no rows. Give one that has.")
    return Pairs(dataset, columns, name)


# ---- opening a data set ------------------------------------------------------------------------------------------------------------


def _open(source: Source, streaming: bool) -> tuple[Any, Columns, str]:
    """A Dataset (streaming: an IterableDataset) of the three columns with undecoded pictures, their names, and the data set's name."""
    import datasets

    name, flag, config, cache_dir = source.name, source.flag, source.dataset_config_name, source.cache_dir
    asked = Columns(source.image_column, source.conditioning_image_column, source.caption_column)
    root = Path(name).expanduser()
    if source.train_data_dir and not root.is_dir():
        raise UserError(f"{flag} {name}: no such directory. Give the directory that holds the pairs.")
    if source.jsonl_for_train or ((root / "metadata.jsonl").is_file() and not config):
        # The library reads a folder with metadata too, but dies of a row without condition, and its error names no line.
        path = root if source.jsonl_for_train else root / "metadata.jsonl"
        return _jsonl(path, f"{flag} {name}", asked, cache_dir, streaming, inside=not source.jsonl_for_train), JSON_COLUMNS, name
    dataset = _library(root, name, flag, config, cache_dir, streaming)
    columns = find_columns(dataset.features, asked, f"{flag} {name}")
    dataset = dataset.select_columns(list(dict.fromkeys(columns)))
    for column in columns[:2]:
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset, columns, name


def _library(root: Path, name: str, flag: str, config: Optional[str], cache_dir: Optional[str], streaming: bool) -> Any:
    """What the `datasets` library makes of a hub id or a directory: one split, all columns, features known."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    where, tars = f"{flag} {name}", sorted(map(str, root.glob("*.tar")))
    if torn := [tar for tar in tars if not _ends(tar)]:
        raise UserError(f"{where}: {len(torn)} of {len(tars)} shards are cut off:\n{listing(torn)}\nCopy them again, or remove them.")
    try:
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            found = _split(datasets.load_from_disk(str(root)), where)
            return found.to_iterable_dataset() if streaming else found
        if tars:
            builder = datasets.load_dataset_builder("webdataset", data_files={"train": tars}, cache_dir=cache_dir)
        else:
            builder = datasets.load_dataset_builder(str(root) if root.is_dir() else name, config, cache_dir=cache_dir)
        if root.is_dir() and isinstance(builder, Parquet):
            return _parquet(_split(builder.config.data_files, where), cache_dir, streaming)
        if not streaming:
            builder.download_and_prepare()
        found = _split(builder.as_streaming_dataset() if streaming else builder.as_dataset(), where)
        return found if found.features is not None else found._resolve_features()  # csv: known after its first rows only
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds; its text, or its cause's, is what helps
        reason = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else error
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


def _split(found: Any, where: str) -> Any:
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) != 1:
        raise UserError(f"{where}: has no split train but {', '.join(found)}. Name or keep one of them only.")
    return found["train"] if "train" in found else next(iter(found.values()))


def find_columns(features: dict, asked: Columns, where: str) -> Columns:
    """The columns of target, condition and caption: the asked ones, or by the usual names. `features`: a column's kind, or None.

    Raises UserError naming the columns there are if one is missing or holds something else.
    """
    there = f"{where} has the columns {', '.join(features)}"
    for flag, column in zip(FLAGS, asked):
        if column and column not in features:
            raise UserError(f"{flag} {column}: {there}. Name one of them.")
    others = [column for column in features if column != asked.image]
    condition = asked.condition or _first(others, ("conditioning_image",), ("conditioning.", "condition"))
    others = [column for column in features if column != condition]
    image = asked.image or _first(others, ("image", "jpg", "png", "jpeg", "webp"), ("image.",))
    image = image or next((column for column in others if _kind(features[column]) == "Image"), None)
    found = Columns(image, condition, asked.caption or _first(others, ("text", "txt", "caption", "prompt"), ()))
    for flag, column, what in zip(FLAGS, found, ("pictures", "pictures", "text")):
        if column is None:
            raise UserError(f"{flag}: {there}; none has a known name. Name the one to use with {flag}.")
        kind, fitting = _kind(features[column]), ("string", "large_string")
        if what == "pictures":
            fitting += ("binary", "large_binary", "Image")
        if kind and kind not in fitting:
            raise UserError(f"{flag} {column}: holds {kind}, not {what}. {there}. Name another with {flag}.")
    return found


def _first(columns: Iterable[str], names: tuple[str, ...], prefixes: tuple[str, ...]) -> Optional[str]:
    exact = [name for name in names if name in columns]
    return next(iter(exact + [column for prefix in prefixes for column in columns if column.startswith(prefix)]), None)


def _kind(feature: Any) -> Optional[str]:
    """How messages call a column's kind. A struct of bytes and path is a picture whose file forgot to say so."""
    if feature is None or isinstance(feature, dict):
        return feature and ("Image" if {"bytes", "path"} <= set(feature) else "a struct")
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__


# ---- .jsonl files ------------------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, where: str, asked: Columns, cache_dir: Optional[str], streaming: bool, inside: bool) -> Any:
    """A data set of strings from the lines of `path`, checked: absolute paths and captions. No picture is opened.

    A folder's own metadata came with its pictures and names those `inside` alone; a .jsonl file that the user named may name any.
    """
    import datasets

    keys, digest = _check_jsonl(path, where, asked, inside)
    features = datasets.Features({column: datasets.Value("string") for column in JSON_COLUMNS})
    return _from_rows(
        _jsonl_rows, features, {"path": str(path.absolute()), "keys": tuple(keys), "inside": inside}, digest, cache_dir, streaming
    )


def _check_jsonl(path: Path, where: str, asked: Columns, inside: bool) -> tuple[Columns, Any]:
    """The keys of the lines and a digest of the file. Raises UserError listing all bad lines, or else all missing files."""
    if not path.is_file():
        raise UserError(f"{where}: no such file. Give a .jsonl file with a line for every pair.")
    digest, keys, bad, absent, number = hashlib.sha256(str(path.absolute()).encode()), None, [], {}, 0
    try:
        for number, line in _lines(path):
            digest.update(line.encode())
            try:
                row = _keyed(line)
                keys = keys or find_columns(dict.fromkeys(row), Columns(*(column and _short(column) for column in asked)), where)
                found = _jsonl_row(row, keys, path.absolute().parent, inside)
            except ValueError as error:
                bad.append(f"line {number}: {error}")
                continue
            pictures = (found["image"], found["conditioning_image"])
            absent.update((picture, number) for picture in pictures if picture and picture not in absent and not os.path.isfile(picture))
    except UnicodeDecodeError:
        raise UserError(f"{where}: {path.name} is not UTF-8 after line {number}. Save the file as UTF-8.") from None
    if bad:
        raise UserError(f"{where}: {len(bad)} lines of {path.name} cannot be used:\n{listing(bad)}\nMend or remove them.")
    if absent:
        lines = (f"{picture} (line {number})" for picture, number in absent.items())
        raise UserError(f"{where}: {len(absent)} files named in {path.name} are missing:\n{listing(lines)}\nMend the lines.")
    if keys is None:
        raise UserError(
            f'{where}: {path.name} has no lines. Write {{"image": ..., "conditioning_image": ..., "text": ...}} for every pair.'
        )
    digest.update(repr(keys).encode())
    return keys, digest


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of every line that is not blank. Only a newline ends one: captions may hold other separators."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _short(key: str) -> str:
    """image_file_name and file_name, as folders of pictures call it, and image are one key."""
    return "image" if key == "file_name" else key[: -len("_file_name")] if key.endswith("_file_name") else key


def _keyed(line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (too deep)") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return {_short(key): value for key, value in row.items()}


def _jsonl_row(row: dict, keys: tuple, root: Path, inside: bool) -> dict[str, Optional[str]]:
    """The row under the names of JSON_COLUMNS, paths taken from `root`; `inside`: and not out of it.

    Raises ValueError for a lacking key, another type, half a character, or a path that leads out.
    """
    if lacking := [key for key in keys if key not in row]:
        raise ValueError(f"lacks {', '.join(lacking)}; has {', '.join(row) or 'no keys'}")
    if wrong := [f"{key} is {row[key]!r}, not text" for key in keys if not isinstance(row[key], (str, type(None)))]:
        raise ValueError("; ".join(wrong))
    if half := [key for key in keys if row[key] and not _whole(row[key])]:
        raise ValueError(f"{half[0]} is {row[half[0]]!r}, which is no text")
    if out := [row[key] for key in keys[:2] if row[key] and inside and not _stays(row[key])]:
        raise ValueError(f"{out[0]} leads out of the directory")
    image, condition = (str(root / row[key]) if row[key] else None for key in keys[:2])
    return dict(zip(JSON_COLUMNS, (image, condition, row[keys[2]])))


def _whole(text: str) -> bool:
    """JSON may hold half a character ("\\ud800") or a zero, which no file name can."""
    try:
        return "\0" not in text and bool(text.encode())
    except UnicodeEncodeError:
        return False


def _stays(name: str) -> bool:
    """Whether a name leads to a file below the directory. Links there are followed: only who owns the disk can lay them."""
    return not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != os.pardir


def _jsonl_rows(path: str, keys: tuple, inside: bool) -> Iterator[dict]:
    for _, line in _lines(Path(path)):
        yield _jsonl_row(_keyed(line), keys, Path(path).parent, inside)


# ---- checking ----------------------------------------------------------------------------------------------------------------------


def preflight_pairs(pairs: Pairs, wanted: Wanted, flag: str, skip_bad: bool, threads: int = 2) -> Pairs:
    """Decodes both pictures of every pair and gives the usable pairs.

    Raises UserError naming every problem at once (one of the two missing or unreadable, sizes that differ, smaller than the
    resolution or than its own bucket), or, with `skip_bad`, prints that list and goes on without them; also if none is left.
    """
    usable, bad = np.ones(len(pairs), dtype=bool), []
    found = prefetch(lambda i: usable_pair_size(pairs[i], wanted), range(len(pairs)), max(1, threads))
    for index, problem in enumerate(found):
        if isinstance(problem, str):
            usable[index] = False
            bad.append(f"{pairs[index].image.name}: {problem}")
    report_bad(bad, f"{len(pairs)} pairs", flag, skip_bad)
    if not usable.any():
        raise UserError(f"{flag}: no usable pair is left.")
    return pairs.select(np.flatnonzero(usable)) if bad else pairs


def usable_pair_size(pair: Pair, wanted: Wanted) -> Union[tuple[int, int], str]:
    """(width, height) of both pictures, wholly decoded, or what keeps the pair from being trained on."""
    size, other = size_or_problem(pair.image), size_or_problem(pair.condition)
    wrong = [f"{what}{found}" for what, found in (("", size), ("its condition is ", other)) if isinstance(found, str)]
    if not wrong and size != other:
        wrong = [f"{size[0]}x{size[1]}, its condition {other[0]}x{other[1]}"]
    if not wrong:
        small = too_small(size, wanted)
        wrong = [small] if small else []
    return "; ".join(wrong) if wrong else size


def require_usable(pair: Pair, wanted: Wanted) -> None:
    """Raises UserError for a pair that `preflight_pairs` would refuse: for streams, which are checked in passing."""
    if isinstance(problem := usable_pair_size(pair, wanted), str):
        raise UserError(f"{pair.image.name}: {problem}. Mend the data set, or remove the pair from it.")


# ---- what a run trains on ----------------------------------------------------------------------------------------------------------


class PairData:
    """The pairs to train on and those kept out, the bucket of each, and which uses of which pairs make up batch number k."""

    def __init__(self, train: Union[Pairs, PairStream], held_out: list[Pair], buckets: list[tuple[int, int]], seed: int, batch_size: int):
        self.train, self.held_out, self.buckets, self.batch_size = train, held_out, buckets, batch_size
        self.streaming = isinstance(train, PairStream)
        # An epoch of a stream is not known: the whole run counts as one.
        self.epoch_length = train.count if self.streaming else len(train)
        self.numbers = None if self.streaming else bucket_numbers((pair.image for pair in train), buckets)
        self.held_out_numbers = bucket_numbers((pair.image for pair in held_out), buckets)
        self.order = None if self.streaming else BucketOrder(seed, self.numbers, batch_size)

    def iterate(self, first: int, last: int, make: Callable[[list, tuple[int, int]], Any], threads: int) -> Iterator[Any]:
        """make(uses, size) of this worker's share of the batches from number `first` to before `last`, made ahead by `threads`.

        A use is (pair, sample id, how often it was used before); of a stream its place stands for the id. `size` is (height, width).
        """
        if self.streaming:
            stream = enumerate(self.train.from_position(first * self.batch_size), first * self.batch_size)
            batches = ([(pair, place, 0) for place, pair in islice(stream, self.batch_size)] for _ in range(first, last))
            share = islice(batches, devices.worker(), None, devices.workers())
            return prefetch(lambda uses: make(uses, self.buckets[0]), share, threads)

        def at(number: int) -> Any:
            bucket, uses = self.order.at(number)
            return make([(self.train[sample_id], sample_id, use) for sample_id, use in uses], self.buckets[bucket])

        return prefetch(at, devices.mine(range(first, last)), threads)

    def digests(self) -> Iterator[str]:
        """What tells one data set from another: the contents of every pair. Of a stream nothing: that would cost as much as the run."""
        return iter(()) if self.streaming else (pair.image.digest + pair.condition.digest + pair.caption for pair in self.train)


def load_data(
    source: Source,
    buckets: list[tuple[int, int]],
    seed: int,
    batch_size: int,
    max_samples: Optional[int],
    held_out_share: float,
    skip_bad: bool,
    threads: int,
) -> PairData:
    """The pairs of a source, all of them checked, split by `seed`. Raises UserError listing every problem at once."""
    found = load_pairs(source)
    if max_samples:
        found = found.select(range(min(max_samples, len(found))))
    found = preflight_pairs(found, wanted(buckets), f"{source.flag} {source.name}", skip_bad, threads)
    kept, kept_out = split(len(found), held_out_share, seed)
    return PairData(found.select(kept), list(found.select(kept_out)), buckets, seed, batch_size)


# ---- streaming ---------------------------------------------------------------------------------------------------------------------


class PairStream:
    """The first `count` pairs (None: no end) of a data set that is never held: pass after pass, shuffled anew in a buffer of rows.

    The order depends on `seed` and `buffer_size` only, so iterating again, or from a position, gives the same pairs. Their samples hold
    the encoded pictures. Sources and errors are those of `load_pairs`; a pair without one of its pictures raises UserError when reached.
    """

    def __init__(self, source: Source, seed: int = 0, buffer_size: int = 1000, count: Optional[int] = None) -> None:
        self.dataset, self.columns, self.name = _open(source, streaming=True)
        self.seed, self.buffer_size, self.count = seed, buffer_size, count

    def __iter__(self) -> Iterator[Pair]:
        return self.from_position(0)

    def from_position(self, start: int) -> Iterator[Pair]:
        """The pairs from number `start` on, as a full iteration gives them. Those before are passed over without being decoded."""
        rows = self._rows(start) if self.count is None else islice(self._rows(start), max(0, self.count - start))
        return (self._pair(row, position) for position, row in enumerate(rows, start))

    def _rows(self, start: int) -> Iterator[dict]:
        number, offset = 0, start
        while True:
            length = 0
            for row in self._pass(number):
                length += 1
                if length > offset:
                    yield row
            if not length:
                raise UserError(f"{self.name}: the data set has no rows. Give one that has.")
            # Every pass is as long as the first, so the whole passes before `start` need no reading.
            number, offset = number + max(1, offset // length), offset % length if offset >= length else 0

    def _pass(self, number: int) -> Iterator[dict]:
        # A seed of its own for every pass rather than set_epoch, which would change the order under another iterator's feet.
        seed = int(generator(self.seed, "stream", number).integers(2**63))
        try:
            yield from self.dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        except Exception as error:  # a torn shard, a lost connection, a cell of another type: the library has no kind in common
            raise UserError(f"{self.name}: the datasets library cannot read on in pass {number}: {error!r}") from None

    def _pair(self, row: dict, position: int) -> Pair:
        name, pictures = f"{self.name}, place {position} of the stream", []
        for what, column in zip(("image", "condition"), self.columns):
            try:
                pictures.append(Sample(name, encoded(row[column])))
            except OSError as error:
                reason = f"missing ({error.filename or error})" if isinstance(error, FileNotFoundError) else f"not readable ({error})"
                raise UserError(f"{name}: its {what} is {reason}. Mend the data set, or remove the pair from it.") from None
        return Pair(*pictures, row[self.columns.caption] or "")
