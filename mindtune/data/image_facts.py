"""What was learnt of images, in a file beside the encoder cache: an unchanged image is not decoded again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from mindtune.data.image_sample import LONGEST_PATH, Sample, find_file
from mindtune.data.images import Visibility
from mindtune.data.inspection import Inspection, inspect
from mindtune.distributed import ranks

FILE = "images.jsonl"
BLOCK = 1000  # rows of a data set that are read at a time


class ImageFacts:
    """The inspections of usable images, by what identifies an unchanged image.

    That is the path, size and time of its file, or the files of the data set that holds it and its row. Images of other
    kinds, such as those behind URLs, are inspected every time. The file has a line per image, which several processes
    may append at the same time; a line that a kill has cut off is ignored. Without `folder` nothing is remembered, and
    with `verify` nothing is looked up.
    """

    def __init__(self, folder: Optional[Path] = None, verify: bool = False) -> None:
        self.path = folder and Path(folder) / FILE
        self.verify = verify
        self.lines: dict[bytes, bytes] = {}  # 300 bytes per image: a million images take 300 MB
        self.columns: dict[tuple[int, str], _Column] = {}
        self.file: Any = None
        self.failed = False
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def opened(self) -> Iterator[ImageFacts]:
        """Reads the file for `inspect`, and closes it. The main process comes first: the others look its results up."""
        if not ranks.is_main_process():
            ranks.all_gather()
        self._read()
        try:
            yield self
        finally:
            self._close()
        if ranks.is_main_process():
            ranks.all_gather()

    def _read(self) -> None:
        if self.path is None or self.verify or not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            for line in file:
                key, separator, facts = line.partition(b" ")
                if separator and facts.endswith(b"}\n"):
                    self.lines[key] = facts

    def inspect(self, sample: Sample, condition: bool = False) -> Inspection:
        """`inspect`, or what it found the last time if the image is usable and has not changed."""
        identity = self._identity(sample) if self.path is not None else None
        if identity is None:
            return inspect(sample, condition)
        key = hashlib.blake2b(f"{identity}/{condition}".encode(errors="surrogateescape"), digest_size=16)
        key = key.hexdigest().encode()
        if known := _from_json(self.lines.get(key, b"")):
            return known
        inspection = inspect(sample, condition)
        if not inspection.problem and ranks.is_main_process():
            self._append(key, _to_json(inspection))
        return inspection

    def _append(self, key: bytes, facts: bytes) -> None:
        with self.lock:
            try:
                if self.file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                    os.write(self.file, b"\n")  # ends a line that a kill has cut off
                os.write(self.file, key + b" " + facts + b"\n")
            except OSError as error:  # another user's file, a full disk: the next start decodes the images again
                if not self.failed:
                    print(f"{self.path}: {error.strerror}, so what is learnt of images is not remembered")
                self.failed = True

    def _close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None
        self.lines = {}
        self.columns = {}

    def _identity(self, sample: Sample) -> Optional[str]:
        """What changes with the image; None if that is not known."""
        if isinstance(sample.source, Path):
            return _file_identity(sample.source)
        if not isinstance(sample.source, tuple) or not hasattr(sample.source[0], "cache_files"):
            return None
        dataset, row, column = sample.source
        found = self.columns.get((id(dataset), column))
        if found is None:
            found = self.columns[id(dataset), column] = _Column(dataset, column)
        path = found.path(row)
        if path and (file := find_file(path, sample.root)):
            return _file_identity(file)
        if path and "://" in path:
            return None
        return found.stamp and f"{found.stamp}/{row}"  # the cell holds the image, as bytes or in base64


def _file_identity(path: Union[Path, str, None]) -> Optional[str]:
    try:
        found = os.stat(path) if path else None
    except (OSError, ValueError):
        return None
    return found and f"{os.path.abspath(path)}/{found.st_size}/{found.st_mtime_ns}"


class _Rows(NamedTuple):
    """The cells of some rows of a column: the path in each cell, None if the cell holds the image itself."""

    first: int
    paths: list[Optional[str]]


class _Column:
    """Which cells of an image column name a file. Reads no image.

    `stamp` changes with the files that hold the data set; None if it is in memory.
    """

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset = dataset.with_format("arrow")
        self.column = column
        self.rows = _Rows(0, [])
        stamps = [_file_identity(file["filename"]) for file in dataset.cache_files]
        self.stamp = f"{stamps}/{dataset._fingerprint}/{column}" if stamps and None not in stamps else None

    def path(self, row: int) -> Optional[str]:
        """The path or URL in the cell of a row; None if the cell holds the image itself."""
        rows = self.rows
        if not rows.first <= row < rows.first + len(rows.paths):
            first = row - row % BLOCK
            self.rows = rows = _Rows(first, self._paths(first))
        return rows.paths[row - rows.first]

    def _paths(self, first: int) -> list[Optional[str]]:
        import pyarrow
        import pyarrow.compute as pc

        cells = self.dataset[first : min(first + BLOCK, len(self.dataset))].column(self.column)
        holds_image = np.zeros(len(cells), dtype=bool)
        if pyarrow.types.is_struct(cells.type):
            names = [field.name for field in cells.type]
            if "bytes" in names:
                holds_image = pc.is_valid(pc.struct_field(cells, "bytes")).to_numpy(zero_copy_only=False)
            cells = pc.struct_field(cells, "path") if "path" in names else None
        if cells is None or not (pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type)):
            return [None] * len(holds_image)
        too_long = pc.fill_null(pc.greater(pc.binary_length(cells), LONGEST_PATH), True)  # an image in base64
        texts = pc.if_else(pc.or_(too_long, pyarrow.array(holds_image)), None, cells)
        return texts.to_pylist()


def _to_json(inspection: Inspection) -> bytes:
    return json.dumps({name: value for name, value in inspection._asdict().items() if value}).encode()


def _from_json(line: bytes) -> Optional[Inspection]:
    """The inspection in a line; None if it is damaged."""
    try:
        facts = json.loads(line)
        facts["size"] = tuple(facts["size"])
        facts["single_colour_on"] = tuple(facts.get("single_colour_on", ()))
        if "visibility" in facts:
            facts["visibility"] = Visibility(*facts["visibility"])
        return Inspection(**facts)
    except (ValueError, KeyError, TypeError):
        return None
