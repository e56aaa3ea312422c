"""An image with its caption, and the reading of images from files, bytes, base64 and URLs."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from PIL import Image

from mindtune.cli import printable
from mindtune.data.images import UnusableImage, decode, flatten

BASE64_TEXT = re.compile(r"[A-Za-z0-9+/_\-\s]{64}")
# How base64 starts for JPEG, PNG, WebP, GIF, BMP, TIFF, and for AVIF and HEIC, which start alike.
BASE64_IMAGE_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk", "SUkqA", "TU0AK", "AAAA")
LONGEST_PATH = 4096
TRANSPARENCY = "transparency"
LONGEST_FILE_NAME = 255


@dataclass
class Sample:
    """One image with its caption. A caption of None stands for the prompt of the whole run.

    `source` is a Path, the encoded bytes, or (dataset, index, column) of a cell that `read_cell` reads with `root`.
    Transparent pixels are put on the colour `background`. `size` (upright width and height, in pixels) and
    `known_digest` are set when the image has been inspected. `concept` is the `Concept` that the image belongs to, if
    any. `mask` is the sample of a mask, or TRANSPARENCY if the image's own is the mask; see `masks`.
    `brightest` is the largest gray value of a mask that has been inspected.
    """

    name: str
    source: Any = field(repr=False)
    caption: Optional[str] = None
    background: str = "white"
    root: Optional[str] = field(default=None, repr=False)
    size: Optional[tuple[int, int]] = field(default=None, repr=False)
    known_digest: Optional[str] = field(default=None, repr=False)
    concept: Any = field(default=None, repr=False)
    mask: Union[Sample, str, None] = field(default=None, repr=False)
    brightest: Optional[int] = field(default=None, repr=False)

    def setting(self, name: str, default: Any) -> Any:
        """The value of a field of the image's concept, or `default`, that of the flag, if it belongs to none."""
        return default if self.concept is None else getattr(self.concept, name)

    def read(self) -> bytes:
        """The encoded image, unchanged. Raises FileNotFoundError if there is none."""
        if not isinstance(self.source, tuple):
            return read_cell(self.source)
        dataset, index, column = self.source
        return read_cell(dataset[index][column], self.root)

    def open(self) -> Image.Image:
        """The decoded image, upright, in 8-bit RGB."""
        return flatten(decode(self.read()), self.background)

    @property
    def digest(self) -> str:
        """The SHA-256 hash of the encoded image, and of the background if it is not white."""
        if self.known_digest is None:
            self.known_digest = content_digest(self.read(), self.background)
        return self.known_digest


def content_digest(content: bytes, background: str) -> str:
    """The SHA-256 hash of an encoded image, and of the background if it is not white."""
    return hashlib.sha256(content if background == "white" else content + background.encode()).hexdigest()


def read_cell(cell: Any, root: Optional[str] = None) -> bytes:
    """The encoded image that a cell of a data set holds or names.

    A cell is bytes, base64, a data URL, a URL, a path (tried relative to `root` first), or {"bytes": ..., "path":
    ...}, of which the bytes are used if there are any. Raises FileNotFoundError if the cell is empty or the file is
    missing, and UnusableImage for text of another kind.
    """
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        is_base64 = cell[:16].decode("ascii", "replace").startswith((*BASE64_IMAGE_STARTS, "data:image/"))
        return (decode_base64(cell.decode("ascii", "replace")) or cell) if is_base64 else cell
    if not cell:
        raise FileNotFoundError("the cell of the data set is empty")
    text = str(cell)
    if path := find_file(text, root):
        return Path(path).read_bytes()
    if (content := decode_base64(text)) is not None:
        return content
    is_url = "://" in text
    if len(text) > LONGEST_PATH or (not is_url and max(map(len, text.split("/"))) > LONGEST_FILE_NAME):
        raise UnusableImage(f"a text of {len(text)} characters that is no path, URL or base64: {printable(text, 110)}")
    if is_url:  # such as the images of a folder that is streamed from the hub
        import fsspec

        with fsspec.open(text, "rb") as file:
            return file.read()
    return Path(text).read_bytes()


def is_empty_cell(cell: Any) -> bool:
    """Whether a cell neither holds nor names an image: it is null, an empty text, or a struct of such fields."""
    return not (cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell)


def find_file(text: str, root: Optional[str]) -> Optional[str]:
    """The file that the text of a cell names, tried relative to `root` first; None if there is none."""
    if len(text) > LONGEST_PATH:
        return None
    in_root = [os.path.join(root, path) for path in (text, text.replace("\\", "/"))] if root else []
    return next((path for path in (*in_root, text) if os.path.isfile(path)), None)


def decode_base64(text: str) -> Optional[bytes]:
    """The content of base64 text or of a data URL; None if `text` is neither.

    Accepts the alphabets for text and for URLs, with or without padding and line breaks. Text of up to 255 characters
    may be a path, so it must start like an image.
    """
    is_data_url = text.startswith("data:")
    text = text.partition(";base64,")[2] if is_data_url else text
    if not BASE64_TEXT.match(text[:64]):
        return None
    if not (is_data_url or text.startswith(BASE64_IMAGE_STARTS) or len(text) > LONGEST_FILE_NAME):
        return None
    try:
        text = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None
