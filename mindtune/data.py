"""Images and captions: finding them, checking all of them before anything large loads, and turning them into arrays."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mindtune.buckets import nearest_bucket
from mindtune.cli import UserError, listing
from mindtune.rng import generator

NOT_IMAGES = {".txt", ".json", ".jsonl", ".csv", ".md"}
INTERPOLATIONS = {name.lower(): getattr(Image.Resampling, name) for name in ("LANCZOS", "BICUBIC", "BILINEAR", "NEAREST", "BOX", "HAMMING")}
Resolution = Union[int, tuple[int, int]]  # the side of a square, or (height, width)
Wanted = Union[int, list[tuple[int, int]]]  # what pictures are cropped to: a square of that side, or the nearest of these buckets


@dataclass
class Sample:
    """One picture with its caption (None: use the prompt of the whole run).

    `source` is where the encoded picture is: a Path, the bytes themselves, or (dataset, index, column), whose cell `encoded` reads.
    """

    name: str
    source: Any = field(repr=False)
    caption: Optional[str] = None

    def read(self) -> bytes:
        """The encoded image, as found on disk or in the dataset. Raises FileNotFoundError if there is none."""
        if not isinstance(self.source, tuple):
            return encoded(self.source)
        dataset, index, column = self.source
        return encoded(dataset[index][column])

    def open(self) -> Image.Image:
        return to_rgb(Image.open(io.BytesIO(self.read())))

    @cached_property
    def digest(self) -> str:
        """Hash of the encoded image."""
        return hashlib.sha256(self.read()).hexdigest()


def encoded(cell: Any) -> bytes:
    """The encoded image of a dataset's cell: {"bytes", "path"}, bytes, or a path or URL. Raises FileNotFoundError if it has none."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not cell:
        raise FileNotFoundError("the dataset has none here")
    if "://" in str(cell):  # the pictures of a folder that is streamed from the hub
        import fsspec

        with fsspec.open(cell, "rb") as file:
            return file.read()
    return Path(cell).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright: EXIF rotation applied, transparency laid on white, 16-bit gray scaled by 1/257, CMYK and palettes converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixel mode {image.mode} is not an 8- or 16-bit picture")
        image = Image.fromarray((values / 257.0 + 0.5).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- finding samples ---------------------------------------------------------------------------------------------------------------


def samples_in_folder(folder: str, flag: str, caption_column: Optional[str] = None) -> list[Sample]:
    """The pictures directly in `folder`, in name order, with captions of metadata.jsonl or a .txt beside each; an empty one is none.

    Raises UserError for a missing or empty folder and for captions that cannot be read; `flag` is what the message calls it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{flag} {folder}: no such directory. Give the directory that holds the images.")
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith(".") and p.suffix.lower() not in NOT_IMAGES)
    if not files:
        inner = [p.name for p in root.iterdir() if p.is_dir()]
        hint = f" It has subdirectories ({', '.join(sorted(inner)[:3])}): give one of them." if inner else " Put 5 to 20 images there."
        raise UserError(f"{flag} {folder}: no image in this directory.{hint}")
    captions = _metadata_captions(root, caption_column)
    if strangers := sorted(set(captions) - {path.name for path in files}):
        raise UserError(f"{root / 'metadata.jsonl'}: names files that are not in this directory:\n{listing(strangers)}")
    samples, bad = [], []
    for path in files:
        caption = captions.get(path.name)
        beside = path.with_suffix(".txt")
        if caption is None and beside.is_file():
            try:
                caption = beside.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                bad.append(f"{beside}: byte {error.start} is not UTF-8")
        samples.append(Sample(path.name, path, caption or None))
    if bad:
        raise UserError(f"{flag}: {len(bad)} caption files are not UTF-8; save them as UTF-8:\n{listing(bad)}")
    return samples


def _metadata_captions(root: Path, caption_column: Optional[str]) -> dict[str, str]:
    path = root / "metadata.jsonl"
    if not path.is_file():
        return {}
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028 inside a caption
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions[row["file_name"]] = caption = row[caption_column or "text"]
            if not isinstance(caption, (str, type(None))):
                raise TypeError(f"the caption is {caption!r}, not a text")
            f"{row['file_name']}{caption}".encode()  # "\ud800" is JSON, and half a character
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f'{path}, line {number}: expected an object with "file_name" and "{caption_column or "text"}" ({error!r}). '
                "Mend the line or name the caption's key with --caption_column."
            ) from None
    return captions


def samples_in_dataset(
    name: str, config: Optional[str], cache_dir: Optional[str], image_column: Optional[str], caption_column: Optional[str]
) -> list[Sample]:
    """The train split of a dataset that the `datasets` library reads (a hub id or a local folder), undecoded until used."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, cache_dir=cache_dir, split="train")
    except Exception as error:  # the library raises a dozen kinds; its text is what helps
        raise UserError(f"--dataset_name {name}: the datasets library cannot read it: {error}") from None
    images = [c for c, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    image_column = image_column or ("image" if "image" in images else images[0] if images else None)
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column is not None and column not in dataset.column_names:
            raise UserError(f"{flag} {column}: {name} has the columns {', '.join(dataset.column_names)}. Name one of them.")
    if image_column not in images:
        raise UserError(f"--image_column {image_column}: not an image column of {name}; its image columns: {images or 'none'}.")
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    captions = dataset[caption_column] if caption_column else [None] * len(dataset)
    if foreign := [caption for caption in captions if not isinstance(caption, (str, type(None)))]:
        raise UserError(f"--caption_column {caption_column}: holds {foreign[0]!r}, not text. Name another column.")
    return [Sample(f"{name}[{i}]", (dataset, i, image_column), captions[i] or None) for i in range(len(dataset))]


# ---- checking ----------------------------------------------------------------------------------------------------------------------


def preflight(samples: list[Sample], wanted: Wanted, flag: str, skip_bad: bool, threads: int = 2) -> list[Sample]:
    """Decodes every picture and gives the usable ones. Nothing is deleted or changed.

    Raises UserError naming every problem at once (unreadable, truncated, smaller than the resolution or its bucket), or, with
    `skip_bad`, prints that list and goes on without them; also if none is left.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = list(pool.map(lambda sample: usable_size(sample, wanted), samples))
    bad = [f"{sample.name}: {problem}" for sample, problem in zip(samples, found) if isinstance(problem, str)]
    report_bad(bad, f"{len(samples)} files", flag, skip_bad)
    good = [sample for sample, size in zip(samples, found) if not isinstance(size, str)]
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


def size_or_problem(sample: Sample) -> Union[tuple[int, int], str]:
    """(width, height) of the upright picture, wholly decoded, or what is wrong with it."""
    try:
        return sample.open().size
    except FileNotFoundError as error:
        return f"missing ({error.filename or error})"
    except UnidentifiedImageError:
        return "not an image that Pillow can read"
    except Image.DecompressionBombError as error:
        return f"too many pixels for a photograph ({error})"
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        return f"damaged ({error})"


def too_small(size: tuple[int, int], wanted: Wanted) -> Optional[str]:
    """Says so if a picture of `size` (width, height) does not cover the resolution, or its bucket; otherwise None."""
    square = isinstance(wanted, int)
    height, width = height_width(wanted if square else wanted[nearest_bucket(size, wanted)])
    if size[0] >= width and size[1] >= height:
        return None
    what = f"--resolution {wanted}" if square else f"its bucket {height},{width} (height,width)"
    return f"{size[0]}x{size[1]} is smaller than {what}"


def usable_size(sample: Sample, wanted: Wanted) -> Union[tuple[int, int], str]:
    """(width, height) of the upright picture, wholly decoded, or what keeps it from being trained on."""
    size = size_or_problem(sample)
    return size if isinstance(size, str) else too_small(size, wanted) or size


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
