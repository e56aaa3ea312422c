"""Images with captions: reading them, checking all of them before anything large loads, and turning them into arrays."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np
from PIL import Image, ImageOps

from mindtune.buckets import nearest_bucket
from mindtune.cli import UserError, few, listing, shown
from mindtune.images import Ink, UnusableImage, decode, flatten, ink, is_flat, problem, to_rgb  # noqa: F401  (to_rgb: for callers)
from mindtune.rng import generator

INTERPOLATIONS = {name.lower(): getattr(Image.Resampling, name) for name in ("LANCZOS", "BICUBIC", "BILINEAR", "NEAREST", "BOX", "HAMMING")}
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64}")
# How JPEG, PNG, WebP, GIF, BMP, TIFF and, both alike, AVIF and HEIC begin.
BASE64_IMAGES = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk", "SUkqA", "TU0AK", "AAAA")
Resolution = Union[int, tuple[int, int]]  # the side of a square, or (height, width)
Wanted = Union[int, list[tuple[int, int]]]  # what pictures are cropped to: a square of that side, or the nearest of these buckets


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
    if not BASE64.match(text[:64]) or not (url or text.startswith(BASE64_IMAGES) or len(text) > 255):  # shorter ones may be paths
        return None
    try:
        text = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None


# ---- checking ----------------------------------------------------------------------------------------------------------------------


def preflight(samples: list[Sample], wanted: Wanted, flag: str, skip_bad: bool, threads: int = 2) -> list[Sample]:
    """Decodes every image and gives the usable ones. Nothing is deleted or changed.

    Raises UserError naming every problem at once (unreadable, truncated, smaller than the resolution or its bucket), or, with
    `skip_bad`, prints that list and goes on without them; also if none is left.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = list(pool.map(lambda sample: usable(sample, wanted), samples))
    bad = [f"{sample.name}: {each.size}" for sample, each in zip(samples, found) if isinstance(each.size, str)]
    report_bad(bad, f"{len(samples)} files", flag, skip_bad)
    for note in image_notes(zip((sample.name for sample in samples), found), flag):
        print(note)
    good = [sample for sample, each in zip(samples, found) if not isinstance(each.size, str)]
    if not good:
        raise UserError(f"{flag}: no usable image is left.")
    return good


def report_bad(bad: list[str], total: str, flag: str, skip_bad: bool) -> None:
    """Raises UserError listing `bad`, or prints the list if `skip_bad`; nothing if it is empty. `total` reads "25 files"."""
    if bad and not skip_bad:
        raise UserError(
            f"{flag}: {len(bad)} of {total} cannot be used:\n{listing(bad)}\n"
            "Replace or move them, or go on without them by --skip_bad_images."
        )
    if bad:
        print(f"{flag}: going on without {len(bad)} of {total}:\n{listing(bad)}")


class Look(NamedTuple):
    """What decoding an image found: its (width, height), upright, or what is wrong with it; if it has more frames, and if it is dark.

    Dark is 16-bit gray that holds no value above 255. Of a condition also the backgrounds on which it has one colour only, and the ink
    of a transparent one.
    """

    size: Union[tuple[int, int], str]
    animated: bool = False
    flat_on: tuple[str, ...] = ()
    ink: Optional[Ink] = None
    dark: bool = False


def look(sample: Sample, condition: bool = False) -> Look:
    """Decodes a sample wholly."""
    content = None
    try:
        content = sample.read()
        image = decode(content)
        animated, shades = image.info["animated"], ink(image) if condition else None
        laid = {ground: flatten(image, ground) for ground in (("white", "black") if shades else (sample.background,))}
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        return Look(problem(error, content))
    flat_on = [ground for ground, found in laid.items() if condition and is_flat(found)]
    if flat_on and not shades:
        flat_on = ["white", "black"]
    dark = image.mode.startswith("I") and 0 < image.getextrema()[1] < 256
    return Look(image.size, animated, tuple(flat_on), shades, dark)


def image_notes(found: Iterable[tuple[str, Look]], flag: str) -> list[str]:
    """Says of which images, by name, only the first frame is used, and which are nearly black; nothing if there are none."""
    found, lines = list(found), []
    if names := [name for name, each in found if each.animated]:
        lines.append(f"{flag}: only the first frame (or page) is used of {len(names)} with several: {few(names)}")
    if names := [name for name, each in found if each.dark]:
        lines.append(f"{flag}: {len(names)} are 16-bit with values up to 255 of 65535, so black; save them as 8-bit PNG: {few(names)}")
    return lines


def too_small(size: tuple[int, int], wanted: Wanted) -> Optional[str]:
    """Says so if a picture of `size` (width, height) does not cover the resolution, or its bucket; otherwise None."""
    square = isinstance(wanted, int)
    height, width = height_width(wanted if square else wanted[nearest_bucket(size, wanted)])
    if size[0] >= width and size[1] >= height:
        return None
    what = f"--resolution {wanted}" if square else f"its bucket {height},{width} (height,width)"
    return f"{size[0]}x{size[1]} is smaller than {what}"


def usable(sample: Sample, wanted: Wanted) -> Look:
    """`look`, whose problem is also that the image is too small."""
    found = look(sample)
    small = None if isinstance(found.size, str) else too_small(found.size, wanted)
    return found._replace(size=small) if small else found


# ---- pixels ------------------------------------------------------------------------------------------------------------------------


def height_width(resolution: Resolution) -> tuple[int, int]:
    """(height, width) in pixels of a resolution given as one number, for a square, or as the two."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def resize_shorter_side(image: Image.Image, resolution: Resolution, interpolation: str) -> Image.Image:
    """Scaled so that it just covers `resolution`: one side fits, the other is as long or longer (of a square: the shorter side fits)."""
    height, width = height_width(resolution)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, INTERPOLATIONS[interpolation])


def crop_box(size: tuple[int, int], resolution: Resolution, u: Optional[tuple[float, float]]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of `resolution` in an image of `size`: central, or at u = (x, y) in [0, 1) of the free room."""
    height, width = height_width(resolution)
    room = (size[0] - width, size[1] - height)
    left, top = (round(r / 2.0) for r in room) if u is None else (int(v * (r + 1)) for v, r in zip(u, room))
    return left, top, left + width, top + height


def pixel_values(
    image: Image.Image, resolution: Resolution, interpolation: str, u: Optional[tuple[float, float]] = None, flip: bool = False
) -> np.ndarray:
    """RGB picture to float32 [3, height, width] in [-1, 1]: `resize_shorter_side`, crop (`crop_box`), mirror if `flip`."""
    image = resize_shorter_side(image, resolution, interpolation)
    image = image.crop(crop_box(image.size, resolution, u))
    if flip:
        image = ImageOps.mirror(image)
    return (np.asarray(image, dtype=np.float32) / 127.5 - 1.0).transpose(2, 0, 1)


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held out): a seeded choice of `share` of the ids below `count`, at least one if the share is above 0.

    Raises UserError if none would be left to train on.
    """
    if not share:
        return list(range(count)), []
    wanted = max(1, round(share * count))
    if wanted >= count:
        raise UserError(f"--validation_split {share}: would keep out {wanted} of {count} pictures; use a smaller share.")
    out = set(generator(seed, "held out").permutation(count)[:wanted].tolist())
    return [i for i in range(count) if i not in out], sorted(out)


def prefetch(make: Callable[[int], Any], positions: range, workers: int) -> Iterator[Any]:
    """make(p) for every position in order; with `workers` threads that many (and two more) are made ahead."""
    if workers < 1:
        yield from map(make, positions)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending, ahead = [], iter(positions)
        try:
            for position in ahead:
                pending.append(pool.submit(make, position))
                if len(pending) > workers + 1:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
