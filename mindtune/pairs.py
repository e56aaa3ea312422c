"""Pairs for ControlNet training: a target image, its condition image and a caption; checked, put in order, streamed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from mindtune import devices
from mindtune.buckets import BucketOrder, bucket_numbers, wanted
from mindtune.cli import UserError, few, shown
from mindtune.columns import Columns, Source
from mindtune.data import Look, Sample, Wanted, encoded, image_notes, look, prefetch, report_bad, split, too_small
from mindtune.images import Ink, ground, is_transparent, problem
from mindtune.named_files import elsewhere
from mindtune.rng import generator
from mindtune.tables import open_rows

PEEK, FAR = 16, 256  # the first 16 transparent conditions among a stream's first 256 rows decide what such are laid on


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
        self.dataset, self.columns, self.name, self.rows, self.root, self.background = dataset, columns, name, rows, root, background
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
        return Pairs(self.dataset, self.columns, self.name, rows[np.fromiter(indices, dtype=np.int64)], self.root, self.background)

    def on(self, background: str) -> Pairs:
        """The same pairs, transparent conditions laid on `background`."""
        if background == self.background:
            return self
        return Pairs(self.dataset, self.columns, self.name, self.rows, self.root, background)


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
    """What messages call an image: its file if it is one, otherwise its row (the path a data set embeds need not be unique)."""
    # /9j/ is also how a JPEG in base64 begins.
    file = path and len(path) <= 4096 and (elsewhere(path) if "://" in path else os.path.isabs(path) and not elsewhere(path))
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


# ---- checking ----------------------------------------------------------------------------------------------------------------------


def preflight_pairs(pairs: Pairs, wanted: Wanted, flag: str, skip_bad: bool, threads: int = 2) -> Pairs:
    """Decodes both images of every pair and gives the usable pairs, transparent conditions laid on what shows them.

    Raises UserError naming every problem at once (one of the two missing or unreadable, sizes that differ, smaller than the
    resolution or than its own bucket), or, with `skip_bad`, prints that list and goes on without them; also if none is left.
    """
    usable, bad, notes = np.ones(len(pairs), dtype=bool), [], Notes()
    found = prefetch(lambda i: (pairs[i], usable_pair(pairs[i], wanted)), range(len(pairs)), max(1, threads))
    for index, (pair, looked) in enumerate(found):
        notes.add(pair, looked)
        if isinstance(looked.size, str):
            usable[index] = False
            bad.append(f"{pair.image.name}: {looked.size}")
    report_bad(bad, f"{len(pairs)} pairs", flag, skip_bad)
    if not usable.any():
        raise UserError(f"{flag}: no usable pair is left.")
    for line in notes.lines(flag):
        print(line)
    return (pairs.select(np.flatnonzero(usable)) if bad else pairs).on(notes.background)


class PairLook(NamedTuple):
    """(width, height) of both images of a pair, or what keeps it from being trained on; and what decoding each of them found."""

    size: Union[tuple[int, int], str]
    image: Look
    condition: Look


def usable_pair(pair: Pair, wanted: Wanted) -> PairLook:
    """Decodes both images wholly."""
    image, condition = look(pair.image), look(pair.condition, condition=True)
    size, other = image.size, condition.size
    wrong = [f"{what}{found}" for what, found in (("", size), ("its condition: ", other)) if isinstance(found, str)]
    if not wrong and size != other:
        wrong = [f"{size[0]}x{size[1]}, its condition {other[0]}x{other[1]}"]
    if not wrong:
        small = too_small(size, wanted)
        wrong = [small] if small else []
    return PairLook("; ".join(wrong) if wrong else size, image, condition)


class Notes:
    """What is to be said of the usable pairs of a data set: animations, conditions of one colour, and what transparent ones lie on."""

    def __init__(self) -> None:
        self.images, self.flat, self.count, self.transparent, self.ink = [], {"white": [], "black": []}, 0, 0, Ink()

    def add(self, pair: Pair, looked: PairLook) -> None:
        if isinstance(looked.size, str):
            return
        self.count += 1
        found = ((pair.image.name, looked.image), (pair.condition.name, looked.condition))
        self.images += [(name, each) for name, each in found if each.animated or each.dark]
        if looked.condition.ink:
            self.transparent, self.ink = self.transparent + 1, Ink(*map(sum, zip(self.ink, looked.condition.ink)))
        for background in looked.condition.flat_on:
            self.flat[background].append(pair.condition.name)

    @property
    def background(self) -> str:
        """What transparent conditions are laid on: one colour for the whole data set, so that all of them look alike."""
        return ground(self.ink)

    def lines(self, flag: str) -> list[str]:
        flat, lines, lost = self.flat[self.background], image_notes(self.images, flag), self.ink.lost(self.background)
        if self.background == "black":
            unseen = f"on white {self.ink.lost('white'):.0%} of their drawing would not be seen"
            lines.append(f"{flag}: {self.transparent} transparent conditions are laid on black; {unseen}")
        if lost >= 0.1:
            what = f"{self.transparent} transparent conditions are laid on {self.background}, where {lost:.0%} of their drawing is not seen"
            lines.append(f"{flag}: {what}. Give them a ground that shows all of it.")
        if flat:
            lines.append(f"{flag}: {len(flat)} of {self.count} conditions are blank, of one colour throughout: {few(flat)}")
        return lines


def require_usable(pair: Pair, wanted: Wanted) -> None:
    """Raises UserError for a pair that `preflight_pairs` would refuse: for streams, which are checked in passing."""
    if isinstance(wrong := usable_pair(pair, wanted).size, str):
        raise UserError(f"{pair.image.name}: {wrong}. Mend the data set, or remove the pair from it.")


# ---- what a run trains on ----------------------------------------------------------------------------------------------------------


class PairData:
    """The pairs to train on and those kept out, the bucket of each, and which uses of which pairs make up batch number k."""

    def __init__(self, train: Union[Pairs, PairStream], held_out: list[Pair], buckets: list[tuple[int, int]], seed: int, batch_size: int):
        self.train, self.held_out, self.buckets, self.batch_size = train, held_out, buckets, batch_size
        self.streaming, self.background = isinstance(train, PairStream), train.background
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

    def __init__(
        self, source: Source, seed: int = 0, buffer_size: int = 1000, count: Optional[int] = None, say: Callable[[str], None] = print
    ) -> None:
        self.dataset, self.columns = open_rows(source, streaming=True, say=say)
        self.name, self.root = source.name, source.root
        self.seed, self.buffer_size, self.count, self.background = seed, buffer_size, count, "white"
        notes = self._first_look()
        self.background = notes.background
        for line in notes.lines(f"{source.flag} {shown(source.name)}, {notes.count} pairs of its first {FAR} rows"):
            say(line)

    def _first_look(self) -> Notes:
        """Of the first pairs, and then of those whose condition may be transparent. What is wrong is said when it is reached."""
        notes = Notes()
        with contextlib.suppress(Exception):  # the stream breaks off
            for place, row in enumerate(islice(self.dataset, FAR)):
                if place >= PEEK <= notes.transparent:
                    break
                with contextlib.suppress(Exception):  # a bad row
                    pair = self._pair(row, place)
                    if place < PEEK or is_transparent(Image.open(io.BytesIO(pair.condition.source))):
                        notes.add(pair, usable_pair(pair, 1))
        return notes

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
        name, images = f"{shown(self.name)}, place {position} of the stream", []
        for what, column, background in zip(("image", "condition"), self.columns, ("white", self.background)):
            try:
                images.append(Sample(name, encoded(row[column], self.root), background=background))
            except Exception as error:  # reading a URL raises many kinds
                raise UserError(f"{name}: its {what}: {problem(error)}. Mend the data set, or remove the pair from it.") from None
        return Pair(*images, row[self.columns.caption] or "")
