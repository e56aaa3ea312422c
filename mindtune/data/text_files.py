"""Text files in UTF-8 or with a byte order mark, and caption files."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TextIO

from mindtune.cli import UserError, printable

# The UTF-32 little-endian mark starts with that of UTF-16, so it comes first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SAVE_AS_UTF8 = "in Windows Notepad by Save as, Encoding: UTF-8; elsewhere for example by iconv -f GBK -t UTF-8"


def detect_encoding(start: bytes) -> str:
    """The encoding of the byte order mark at the start of a file; UTF-8 without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS if start.startswith(mark)), "utf-8-sig")


def open_text(path: Path, newline: str) -> TextIO:
    """Opens a text file in its encoding. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        return open(path, encoding=detect_encoding(start), newline=newline)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({error.strerror}).") from None


def read_caption(path: Path) -> str:
    """The text of a caption file, without surrounding whitespace.

    Raises ValueError if the file cannot be read, or is neither UTF-8 nor what its byte order mark says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    encoding = detect_encoding(content[:4])
    if encoding == "utf-8-sig" and b"\0" in content:  # every second byte of English in UTF-16
        raise ValueError(f"byte {content.find(0)} is zero, as in UTF-16 without a byte order mark")
    try:
        return content.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not {encoding.replace('-sig', '').upper()}") from None


def is_text_file(path: Path) -> bool:
    """Whether a file starts like text: without a zero byte, unless a byte order mark says UTF-16 or UTF-32."""
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError:  # reading the file will raise it again
        return True
    return b"\0" not in start or detect_encoding(start) != "utf-8-sig"


def is_valid_text(text: str) -> bool:
    """Whether a string can be a file name. JSON may hold lone surrogates ("\\ud800") and zeros, a name not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
