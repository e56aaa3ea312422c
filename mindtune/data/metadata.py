"""Text that people keep beside images: caption files, rows of metadata.jsonl and .csv, and the file names that those rows give."""

from __future__ import annotations

import codecs
import csv
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, TextIO, Union

from mindtune.cli import UserError, shown

# UTF-32's little-endian mark begins with UTF-16's, so it comes first.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SAVE_AS_UTF8 = "in Windows Notepad by Save as, Encoding: UTF-8; elsewhere for example by iconv -f GBK -t UTF-8"
csv.field_size_limit(2**31 - 1)  # an image in base64 is one field
METADATA = ("metadata.jsonl", "metadata.csv")  # in the order in which they are looked for


def encoding(head: bytes) -> str:
    """The encoding that a byte order mark at a file's beginning tells, otherwise UTF-8."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "utf-8-sig")


def caption_text(path: Path) -> str:
    """The text of a caption file, stripped. Raises ValueError if it is not UTF-8 and no byte order mark tells what it is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    kind = encoding(content[:4])
    if kind == "utf-8-sig" and b"\0" in content:  # every second byte of English in UTF-16
        raise ValueError(f"byte {content.find(0)} is zero, as in UTF-16 without a byte order mark")
    try:
        return content.decode(kind).strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not {kind.replace('-sig', '').upper()}") from None


def metadata_file(root: Path) -> Optional[Path]:
    """The folder's metadata.jsonl, or else metadata.csv, in capitals or not, a blank one last; None if it has neither."""
    try:
        names = sorted(name for name in os.listdir(root) if name.lower() in METADATA and (root / name).is_file())
    except OSError:  # no such directory, or none that may be read
        return None
    there = {name.lower(): root / name for name in names}  # the last, in small letters, stays
    found = [there[name] for name in METADATA if name in there]
    return min(found, key=is_blank, default=None)


def is_blank(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return not any(line.strip(b"\xef\xbb\xbf \t\r\n") for line in file)
    except OSError:  # said when it is read
        return False


# ---- rows ----------------------------------------------------------------------------------------


def rows(path: Path) -> Iterator[tuple[int, Union[dict, ValueError]]]:
    """(line number from 1, row) of a .jsonl or .csv file; for a line that cannot be read the ValueError that says why.

    Raises UnicodeDecodeError when it reaches text in another encoding, and UserError for a .csv file without a header.
    """
    return _csv_rows(path) if path.suffix.lower() in (".csv", ".tsv") else _jsonl_rows(path)


def _text(path: Path, newline: str) -> TextIO:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        return open(path, encoding=encoding(head), newline=newline)
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror}).") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Union[dict, ValueError]]]:
    # Only a newline ends a line: captions may hold other separators.
    with _text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith("["):
                raise UserError(f"{shown(path)}: is one JSON list; write its objects one a line (jq -c '.[]' does).")
            if number == 1 and line.strip() == "{":
                raise UserError(f"{shown(path)}: has objects over several lines; write them one a line (jq -c . does).")
            if line.strip():
                try:
                    yield number, _object(line)
                except ValueError as error:
                    yield number, error


def _object(line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (too deep)") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, Union[dict, ValueError]]]:
    """The delimiter is the one of , ; tab | that the header has most of; fields may be quoted by "."""
    with _text(path, newline="") as file:
        first = file.readline()
        delimiter = max(",;\t|", key=first.count)
        try:
            header = [
                name.strip() for name in next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
            ]
        except csv.Error:
            header = []
        known = {name.lower() for name in header}
        if not any(name in ("image", "text", "filename") or name.endswith("file_name") for name in known):
            found = shown(first.strip(), 120)
            raise UserError(
                f"{shown(path)}: its first line has to name the columns, such as file_name,text; it is {found!r}."
            )
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
            if not fields:
                continue
            if len(fields) == len(header):
                yield number, dict(zip(header, fields))
            else:
                quote = ", put a caption that holds one in double quotes" if len(fields) > len(header) else ""
                yield (
                    number,
                    ValueError(
                        f"has {len(fields)} fields, the first line {len(header)} (separated by {delimiter!r}{quote})"
                    ),
                )


def is_text_file(path: Path) -> bool:
    """Whether a file begins as text: without a zero, unless a byte order mark tells of UTF-16 or 32."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:  # said when it is read
        return True
    return b"\0" not in head or encoding(head) != "utf-8-sig"


def is_text(text: str) -> bool:
    """JSON may hold half a character ("\\ud800") or a zero, which no file name can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


# ---- names ---------------------------------------------------------------------------------------


def same_name(name: str) -> str:
    """Equal for names that people take for one: in capitals or not, composed (Linux, Windows) or decomposed (macOS), with spaces around."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def stays(name: str) -> bool:
    """Whether a name leads to a file below the directory. Links there are followed: only who owns the disk can lay them."""
    return not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != os.pardir


class Names:
    """Finds the files that metadata name, from `root`: as written, or if there is none by `same_name` and with \\ for /."""

    def __init__(self, root: Path) -> None:
        self.root, self.folders = root, {}

    def find(self, name: str) -> Optional[str]:
        """The path of the one file that `name` means, from `root` and without . and .. in it; None if there is none or several."""
        name = self.from_root(name)
        for written in (name, name.replace("\\", "/")):
            if written and (os.path.isabs(written) or os.path.isfile(self.root / written)):
                return os.path.normpath(written) if os.path.isfile(self.root / written) else None
        found = ""
        for part in os.path.normpath(name.strip().replace("\\", "/")).split("/"):
            if part == os.pardir:
                found = os.path.join(found, part)
                continue
            if found not in self.folders:
                self.folders[found] = self._listing(found)
            there = self.folders[found]
            exact = part in there["names"]
            alike = [part] if exact else there["alike"].get(same_name(part), [])
            if len(alike) != 1:
                return None
            found = os.path.join(found, alike[0])
        return found if os.path.isfile(self.root / found) else None

    def from_root(self, name: str) -> str:
        """An absolute path that leads below `root`, also through links, from there; other names as they are."""
        for real in (os.path.abspath, os.path.realpath) if os.path.isabs(name) else ():
            inner = os.path.relpath(real(name), real(self.root))
            if stays(inner):
                return inner
        return name

    def _listing(self, folder: str) -> dict:
        try:
            names = os.listdir(self.root / folder)
        except OSError:
            names = []
        alike = {}
        for name in names:
            alike.setdefault(same_name(name), []).append(name)
        return {"names": set(names), "alike": alike}
