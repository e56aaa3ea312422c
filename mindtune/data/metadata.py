"""The metadata.jsonl or metadata.csv of a folder, and the rows of .jsonl and .csv files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, TextIO, Union

from mindtune.cli import UserError, printable
from mindtune.data.text_files import open_text

csv.field_size_limit(2**31 - 1)  # an image in base64 is one field
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")  # the first is preferred


def metadata_file(root: Path) -> Optional[Path]:
    """The metadata.jsonl of a folder, or else its metadata.csv, in upper or lower case; None if it has neither.

    A blank file is used only if the other one does not exist.
    """
    try:
        names = sorted(name for name in os.listdir(root) if name.lower() in METADATA_NAMES and (root / name).is_file())
    except OSError:  # no such directory, or not readable
        return None
    paths = {name.lower(): root / name for name in names}  # of names in both cases, the one in lower case is kept
    found = [paths[name] for name in METADATA_NAMES if name in paths]
    return min(found, key=_is_blank, default=None)


def _is_blank(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return not any(line.strip(b"\xef\xbb\xbf \t\r\n") for line in file)
    except OSError:  # reading the file will raise it again
        return False


# ---- rows ----------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, Union[dict, ValueError]]]:
    """(line number from 1, row) of a .jsonl, .csv or .tsv file; a ValueError as the row of a line that cannot be read.

    Raises UnicodeDecodeError at text in another encoding, and UserError for a .csv file without a header.
    """
    return _read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Union[dict, ValueError]]]:
    # Captions may hold other line separators, so only a newline ends a line.
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith("["):
                raise UserError(f"{printable(path)}: is one JSON list; write one object per line (jq -c '.[]' does).")
            if number == 1 and line.strip() == "{":
                raise UserError(
                    f"{printable(path)}: has objects over several lines; write one object per line (jq -c . does)."
                )
            if line.strip():
                try:
                    yield number, _parse_object(line)
                except ValueError as error:
                    yield number, error


def _parse_object(line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _read_csv(path: Path) -> Iterator[tuple[int, Union[dict, ValueError]]]:
    with open_text(path, newline="") as file:
        header, delimiter = _read_csv_header(path, file)
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        while True:
            number = reader.line_num + 2
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, ValueError(f"not CSV ({error})")
                continue
            if len(fields) == len(header):
                yield number, dict(zip(header, fields))
            elif fields:
                quote = ", put a caption that holds one in double quotes" if len(fields) > len(header) else ""
                counts = f"has {len(fields)} fields, the first line {len(header)}"
                yield number, ValueError(f"{counts} (separated by {delimiter!r}{quote})")


def _read_csv_header(path: Path, file: TextIO) -> tuple[list[str], str]:
    """The column names in the first line, and the delimiter: the one of , ; tab | that the line has most of."""
    line = file.readline()
    delimiter = max(",;\t|", key=line.count)
    try:
        fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        fields = []
    header = [field.strip() for field in fields]
    names = {name.lower() for name in header}
    if not any(name in ("image", "text", "filename") or name.endswith("file_name") for name in names):
        found = printable(line.strip(), 120)
        raise UserError(
            f"{printable(path)}: its first line must name the columns, like file_name,text; it is {found!r}."
        )
    return header, delimiter
