"""The data set of the form: the table of `mindtune.check_data`, and its first images."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from mindtune import check_data
from mindtune.data import check_report
from mindtune.data.image_sample import Sample

SIDE = 256  # of a thumbnail, in pixels


def task_of(script: str, values: dict[str, Any]) -> str:
    """The --task of check_data for the pairs of a training script with these values of its flags."""
    if "kontext" in Path(script).name:
        return "kontext"
    return "fill" if values.get("fill") else "controlnet"


def check(
    values: dict[str, Any], count: int = 12, task: str = "controlnet"
) -> tuple[str, list[tuple[Image.Image, str]]]:
    """The report on the data of a command line as text, and thumbnails with captions of the first `count` images.

    `values` are those of a training script's flags; check_data has flags of the same names, and `task`. A pair is one
    thumbnail, the condition image on the right. Raises UserError if the data cannot be read at all.
    """
    flags = check_data.parse_args([]).recorded()
    flags.update((name, value) for name, value in values.items() if name in flags and value is not None)
    flags["task"], flags["pairs"] = task, "train_data_dir" in values  # the script trains on pairs
    with tempfile.TemporaryDirectory() as folder:
        cache_dir = flags["cache_dir"] or folder
        report = check_report.format_report(check_data.make_report(flags, cache_dir))
        return report, thumbnails(flags, cache_dir, count)


def thumbnails(flags: dict[str, Any], cache_dir: str, count: int) -> list[tuple[Image.Image, str]]:
    """(image, caption) of the first `count` images or pairs, without those that cannot be read."""
    flags = {**flags, "max_train_samples": min(count, flags["max_train_samples"] or count)}
    rows: list[tuple[list[Sample], str]]
    if check_data.is_images(flags):
        _, samples = check_data.find_samples(flags, cache_dir, lambda note: None)
        rows = [([sample], sample.caption or flags["instance_prompt"] or sample.name) for sample in samples]
    else:
        _, pairs = check_data.find_pairs(flags, cache_dir, lambda note: None)
        rows = [([*filter(None, pair[:2])], pair.caption or pair.image.name) for pair in pairs]
    found = []
    for samples, caption in rows:
        try:
            images = [sample.open() for sample in samples]
        except Exception:  # decoders raise many kinds; the report names the image
            continue
        found.append((side_by_side(images), caption))
    return found


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """The images in a row, each at most `SIDE` pixels wide and high."""
    for image in images:
        image.thumbnail((SIDE, SIDE))
    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row
