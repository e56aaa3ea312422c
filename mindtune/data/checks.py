"""Checking every image before anything large loads, with one error that names every problem."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional, Union

from mindtune.cli import UserError, few, listing
from mindtune.data.buckets import nearest_bucket
from mindtune.data.crops import height_width
from mindtune.data.image_problems import problem
from mindtune.data.image_sample import Sample
from mindtune.data.images import Ink, decode, flatten, ink, is_flat

MinSize = Union[
    int, list[tuple[int, int]]
]  # what pictures are cropped to: a square of that side, or the nearest of these buckets


def preflight(samples: list[Sample], wanted: MinSize, flag: str, skip_bad: bool, threads: int = 2) -> list[Sample]:
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


class Inspection(NamedTuple):
    """What decoding an image found: its (width, height), upright, or what is wrong with it; if it has more frames, and if it is dark.

    Dark is 16-bit gray that holds no value above 255. Of a condition also the backgrounds on which it has one colour only, and the ink
    of a transparent one.
    """

    size: Union[tuple[int, int], str]
    animated: bool = False
    flat_on: tuple[str, ...] = ()
    ink: Optional[Ink] = None
    dark: bool = False


def inspect(sample: Sample, condition: bool = False) -> Inspection:
    """Decodes a sample wholly."""
    content = None
    try:
        content = sample.read()
        image = decode(content)
        animated, shades = image.info["animated"], ink(image) if condition else None
        laid = {ground: flatten(image, ground) for ground in (("white", "black") if shades else (sample.background,))}
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        return Inspection(problem(error, content))
    flat_on = [ground for ground, found in laid.items() if condition and is_flat(found)]
    if flat_on and not shades:
        flat_on = ["white", "black"]
    dark = image.mode.startswith("I") and 0 < image.getextrema()[1] < 256
    return Inspection(image.size, animated, tuple(flat_on), shades, dark)


def image_notes(found: Iterable[tuple[str, Inspection]], flag: str) -> list[str]:
    """Says of which images, by name, only the first frame is used, and which are nearly black; nothing if there are none."""
    found, lines = list(found), []
    if names := [name for name, each in found if each.animated]:
        lines.append(f"{flag}: only the first frame (or page) is used of {len(names)} with several: {few(names)}")
    if names := [name for name, each in found if each.dark]:
        lines.append(
            f"{flag}: {len(names)} are 16-bit with values up to 255 of 65535, so black; save them as 8-bit PNG: {few(names)}"
        )
    return lines


def too_small(size: tuple[int, int], wanted: MinSize) -> Optional[str]:
    """Says so if a picture of `size` (width, height) does not cover the resolution, or its bucket; otherwise None."""
    square = isinstance(wanted, int)
    height, width = height_width(wanted if square else wanted[nearest_bucket(size, wanted)])
    if size[0] >= width and size[1] >= height:
        return None
    what = f"--resolution {wanted}" if square else f"its bucket {height},{width} (height,width)"
    return f"{size[0]}x{size[1]} is smaller than {what}"


def usable(sample: Sample, wanted: MinSize) -> Inspection:
    """`look`, whose problem is also that the image is too small."""
    found = inspect(sample)
    small = None if isinstance(found.size, str) else too_small(found.size, wanted)
    return found._replace(size=small) if small else found
