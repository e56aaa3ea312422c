"""Checks every image before a model is loaded, with one error that lists all problems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Callable, Optional

from mindtune.cli import UserError, indented_list, progress_bar, short_list
from mindtune.data.buckets import MinSize, covers
from mindtune.data.crops import height_width
from mindtune.data.image_facts import ImageFacts
from mindtune.data.image_sample import Sample
from mindtune.data.inspection import Inspection
from mindtune.data.masks import shape_problem
from mindtune.data.order import prefetch
from mindtune.distributed import ranks


def preflight(
    samples: list[Sample],
    min_size: MinSize,
    flag: str,
    skip_bad: bool,
    threads: int = 2,
    facts: Optional[ImageFacts] = None,
) -> list[Sample]:
    """The samples whose images can be used, with their sizes and digests. Changes no file.

    Decodes the images that `facts` does not know. Raises UserError that lists every image that is missing, unreadable,
    or smaller than `min_size`; with `skip_bad` the list is printed instead. Raises UserError too if no image is left.
    """
    inspected = []
    facts = facts or ImageFacts()
    with facts.opened(), progress_bar("checking", "image", len(samples), ranks.is_main_process()) as bar:
        for sample, inspection in zip(samples, prefetch(facts.inspect, samples, max(1, threads))):
            problem = inspection.problem or size_problem(inspection.size, min_size)
            problem = problem or mask_problem(sample, inspection, facts.inspect)
            inspected.append((sample, inspection._replace(problem=problem)))
            bar.update()
    problems = [f"{sample.name}: {inspection.problem}" for sample, inspection in inspected if inspection.problem]
    report_bad(problems, f"{len(samples)} files", flag, skip_bad)
    for note in image_notes([(sample.name, inspection) for sample, inspection in inspected], flag):
        print(note)
    if dark := [sample.mask.name for sample, _ in inspected if is_dark_mask(sample.mask)]:
        print(f"{flag}: {len(dark)} masks have no bright pixel, so little is learnt; is white 255? {short_list(dark)}")
    usable = []
    for sample, inspection in inspected:
        if not inspection.problem:
            sample.size, sample.known_digest = inspection.size, inspection.digests[sample.background]
            usable.append(sample)
    if not usable:
        raise UserError(f"{flag}: no usable image is left. Give other images.")
    return usable


def mask_problem(
    sample: Sample, inspection: Inspection, inspect_image: Callable[[Sample], Inspection]
) -> Optional[str]:
    """Why the mask file of an image cannot be used; None if it can, or if there is none. Sets what is known of it."""
    if not isinstance(sample.mask, Sample):
        return None
    mask = inspect_image(sample.mask)
    if not mask.problem:
        sample.mask.size, sample.mask.known_digest = mask.size, mask.digests[sample.mask.background]
        sample.mask.brightest = mask.brightest
    problem = mask.problem or shape_problem(inspection.size, mask.size)
    return problem and f"its mask {sample.mask.name}: {problem}"


def is_dark_mask(mask: Any) -> bool:
    """Whether a mask file has no pixel of at least half of the brightness, so that nearly nothing is learnt."""
    return isinstance(mask, Sample) and mask.brightest is not None and mask.brightest < 128


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


def size_problem(size: tuple[int, int], min_size: MinSize) -> Optional[str]:
    """The message for an image of `size` (width, height) that does not cover `min_size`; None if it does."""
    is_square = isinstance(min_size, int)
    crop = height_width(min_size if is_square else min_size(size))
    if covers(size, crop):
        return None
    what = f"--resolution {min_size}" if is_square else f"its bucket {crop[0]},{crop[1]} (height,width)"
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
