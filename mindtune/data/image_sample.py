"""Images with captions: reading them, checking all of them before anything large loads, and turning them into arrays."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from mindtune.cli import shown
from mindtune.data.images import UnusableImage, decode, flatten

BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64}")
# How JPEG, PNG, WebP, GIF, BMP, TIFF and, both alike, AVIF and HEIC begin.
BASE64_IMAGES = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk", "SUkqA", "TU0AK", "AAAA")


@dataclass
class Sample:
    """One image with its caption (None: use the prompt of the whole run).

    `source` is where the encoded image is: a Path, the bytes themselves, or (dataset, index, column), whose cell `encoded` reads, paths
    from `root`. Transparent pixels are laid on `background`.
    """

    name: str
    source: Any = field(repr=False)
    caption: Optional[str] = None
    background: str = "white"
    root: Optional[str] = field(default=None, repr=False)

    def read(self) -> bytes:
        """The encoded image, as found on disk or in the dataset. Raises FileNotFoundError if there is none."""
        if not isinstance(self.source, tuple):
            return encoded(self.source)
        dataset, index, column = self.source
        return encoded(dataset[index][column], self.root)

    def open(self) -> Image.Image:
        return flatten(decode(self.read()), self.background)

    @cached_property
    def digest(self) -> str:
        """Hash of the encoded image, and of what it is laid on if that is not white."""
        digest = hashlib.sha256(self.read())
        if self.background != "white":
            digest.update(self.background.encode())
        return digest.hexdigest()


def encoded(cell: Any, root: Optional[str] = None) -> bytes:
    """The encoded image of a dataset's cell: {"bytes", "path"}, bytes, base64, a data URL, a URL, or a path, first from `root`.

    Raises FileNotFoundError if it has none, and UnusableImage for other text.
    """
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        begins = cell[:16].decode("ascii", "replace").startswith((*BASE64_IMAGES, "data:image/"))
        return (from_base64(cell.decode("ascii", "replace")) or cell) if begins else cell
    if not cell:
        raise FileNotFoundError("the dataset has none here")
    text = str(cell)
    if len(text) <= 4096:
        for place in (text, text.replace("\\", "/")):
            if root and os.path.isfile(os.path.join(root, place)):
                return Path(root, place).read_bytes()
    if not os.path.isfile(text) and (content := from_base64(text)) is not None:
        return content
    if len(text) > 4096 or ("://" not in text and max(map(len, text.split("/"))) > 255):
        raise UnusableImage(f"a text of {len(text)} characters that is no path, URL or base64: {shown(text, 110)}")
    if "://" in text:  # the images of a folder that is streamed from the hub
        import fsspec

        with fsspec.open(text, "rb") as file:
            return file.read()
    return Path(text).read_bytes()


def from_base64(text: str) -> Optional[bytes]:
    """What base64 text or a data URL holds, in either alphabet, with or without padding and line breaks; None if it is neither."""
    url = text.startswith("data:")
    text = text.partition(";base64,")[2] if url else text
    if not BASE64.match(text[:64]) or not (
        url or text.startswith(BASE64_IMAGES) or len(text) > 255
    ):  # shorter ones may be paths
        return None
    try:
        text = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None


# ---- checking ------------------------------------------------------------------------------------


# ---- pixels --------------------------------------------------------------------------------------
