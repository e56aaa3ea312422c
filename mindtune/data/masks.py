"""Masks of images, which weight the loss: white is learnt, black is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from mindtune.data.crops import Resolution, cropped, height_width
from mindtune.data.file_names import normalize_name
from mindtune.data.image_sample import TRANSPARENCY, Sample
from mindtune.data.images import decode, flatten, is_transparent

SUFFIX = ".mask"  # photo.jpg has the mask photo.mask.png


def is_mask_file(path: Path) -> bool:
    """Whether a file is named like a mask, as photo.mask.png is."""
    return len(path.stem) > len(SUFFIX) and path.stem.lower().endswith(SUFFIX)


def match_mask_files(images: Iterable[Path], files: Iterable[Path]) -> dict[Path, Path]:
    """The first of the mask `files` of each image that has one: photo.mask.png or photo.jpg.mask.png for photo.jpg.

    Names are compared by `normalize_name`.
    """
    masks: dict[tuple[Path, str], Path] = {}
    for path in sorted(files):
        masks.setdefault((path.parent, normalize_name(path.stem[: -len(SUFFIX)])), path)
    found = {}
    for image in images:
        keys = ((image.parent, normalize_name(name)) for name in (image.stem, image.name))
        if own := next((masks[key] for key in keys if key in masks), None):
            found[image] = own
    return found


def shape_problem(image: tuple[int, int], mask: tuple[int, int]) -> Optional[str]:
    """Why a mask of this size does not fit an image, both (width, height); None if it does: at any scale."""
    scaled = (image[0] * mask[1] / image[1], image[1] * mask[0] / image[0])
    if all(abs(side - expected) <= max(1.0, 0.01 * side) for side, expected in zip(mask, scaled)):
        return None
    return f"is {mask[0]}x{mask[1]}, and the image {image[0]}x{image[1]}: give a mask of the same shape"


def loss_weights(
    sample: Sample,
    resolution: Resolution,
    factor: int,
    unmasked: float,
    position: Optional[tuple[float, float]] = None,
    flip: bool = False,
) -> np.ndarray:
    """The weight of the loss at each latent of a crop, float32 [1, height / factor, width / factor].

    It is the mean over the `factor` x `factor` pixels of the latent: `unmasked` where the mask is black, 1 where it is
    white; 1 everywhere for an image without a mask. The crop is that of `crops.pixel_values`.
    """
    height, width = (side // factor for side in height_width(resolution))
    if sample.mask is None:
        return np.ones((1, height, width), np.float32)
    mask = cropped(open_mask(sample), resolution, "bilinear", position, flip)
    values = np.asarray(mask, dtype=np.float32) / 255.0
    means = values.reshape(height, factor, width, factor).mean(axis=(1, 3))
    return unmasked + (1.0 - np.float32(unmasked)) * means[None]


def read_mask(mask: Sample) -> Image.Image:
    """A mask in 8-bit gray, upright; transparent pixels are black."""
    return flatten(decode(mask.read()), "black").convert("L")


def open_mask(sample: Sample) -> Image.Image:
    """The mask of an image in 8-bit gray, with the image's size: its file, or the image's transparency."""
    if sample.mask == TRANSPARENCY:
        image = decode(sample.read())
        if is_transparent(image):
            return image.convert("RGBA").getchannel("A")
        return Image.new("L", image.size, 255)
    mask = read_mask(sample.mask)
    size = sample.size or sample.open().size
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
