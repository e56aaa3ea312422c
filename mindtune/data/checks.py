"""Checks every image before a model is loaded, with one error that lists all problems."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional, Union

from mindtune.cli import UserError, indented_list, short_list
from mindtune.data.buckets import nearest_bucket
from mindtune.data.crops import height_width
from mindtune.data.image_problems import describe_problem
from mindtune.data.image_sample import Sample
from mindtune.data.images import Visibility, decode, flatten, has_single_colour, measure_visibility

# The crop that images must cover: a square of this side, or the nearest of these buckets (height, width), in pixels.
MinSize = Union[int, list[tuple[int, int]]]


def preflight(samples: list[Sample], min_size: MinSize, flag: str, skip_bad: bool, threads: int = 2) -> list[Sample]:
    """The samples whose images can be used. Decodes all of them and changes no file.

    Raises UserError that lists every image that is missing, unreadable, or smaller than `min_size`; with `skip_bad`
    the list is printed instead. Raises UserError too if no image is left.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        inspections = list(pool.map(lambda sample: inspect_for_training(sample, min_size), samples))
    inspected = list(zip(samples, inspections))
    problems = [f"{sample.name}: {inspection.problem}" for sample, inspection in inspected if inspection.problem]
    report_bad(problems, f"{len(samples)} files", flag, skip_bad)
    for note in image_notes([(sample.name, inspection) for sample, inspection in inspected], flag):
        print(note)
    usable = [sample for sample, inspection in inspected if not inspection.problem]
    if not usable:
        raise UserError(f"{flag}: no usable image is left. Give other images.")
    return usable


def report_bad(problems: list[str], total: str, flag: str, skip_bad: bool) -> None:
    """Raises UserError that lists `problems`, or prints the list if `skip_bad`. `total` is text like "25 files"."""
    if not problems:
        return
    if skip_bad:
        print(f"{flag}: continuing without {len(problems)} of {total}:\n{indented_list(problems)}")
        return
    raise UserError(
        f"{flag}: {len(problems)} of {total} cannot be used:\n{indented_list(problems)}\n"
        "Replace or move them, or add --skip_bad_images to continue without them."
    )


class Inspection(NamedTuple):
    """What decoding an image shows.

    size: upright (width, height) in pixels; None if the image cannot be decoded.
    problem: why the image cannot be used; None if it can.
    animated: the image has more than one frame.
    is_dark: 16-bit gray without a value above 255, which is nearly black.
    single_colour_on: of a condition image, the backgrounds on which it has a single colour.
    visibility: of a transparent condition image.
    """

    size: Optional[tuple[int, int]] = None
    problem: Optional[str] = None
    animated: bool = False
    is_dark: bool = False
    single_colour_on: tuple[str, ...] = ()
    visibility: Optional[Visibility] = None


def inspect(sample: Sample, condition: bool = False) -> Inspection:
    """Decodes the whole image of a sample. `condition`: it is a condition image."""
    content = None
    try:
        content = sample.read()
        image = decode(content)
        visibility = measure_visibility(image) if condition else None
        backgrounds = ("white", "black") if visibility else (sample.background,)
        flattened = {background: flatten(image, background) for background in backgrounds}
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        return Inspection(problem=describe_problem(error, content))
    single_colour_on = [name for name, found in flattened.items() if condition and has_single_colour(found)]
    if single_colour_on and not visibility:  # an opaque image looks the same on every background
        single_colour_on = ["white", "black"]
    return Inspection(
        size=image.size,
        animated=image.info["animated"],
        is_dark=image.mode.startswith("I") and 0 < image.getextrema()[1] < 256,
        single_colour_on=tuple(single_colour_on),
        visibility=visibility,
    )


def inspect_for_training(sample: Sample, min_size: MinSize) -> Inspection:
    """`inspect`, with an image smaller than `min_size` as a problem too."""
    inspection = inspect(sample)
    if inspection.problem:
        return inspection
    return inspection._replace(problem=size_problem(inspection.size, min_size))


def size_problem(size: tuple[int, int], min_size: MinSize) -> Optional[str]:
    """The message for an image of `size` (width, height) that does not cover `min_size`; None if it does."""
    is_square = isinstance(min_size, int)
    height, width = height_width(min_size if is_square else min_size[nearest_bucket(size, min_size)])
    if size[0] >= width and size[1] >= height:
        return None
    what = f"--resolution {min_size}" if is_square else f"its bucket {height},{width} (height,width)"
    return f"{size[0]}x{size[1]} is smaller than {what}"


def image_notes(inspected: Iterable[tuple[str, Inspection]], flag: str) -> list[str]:
    """Notes on images, given as (name, inspection): on those with several frames, and those that are nearly black."""
    inspected = list(inspected)
    notes = []
    if animated := [name for name, inspection in inspected if inspection.animated]:
        notes.append(
            f"{flag}: {len(animated)} images have several frames or pages, of which the first is used: "
            f"{short_list(animated)}"
        )
    if dark := [name for name, inspection in inspected if inspection.is_dark]:
        notes.append(
            f"{flag}: {len(dark)} images are 16-bit without a value above 255 of 65535, so nearly black; "
            f"save them as 8-bit PNG: {short_list(dark)}"
        )
    return notes
