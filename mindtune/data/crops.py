"""Turns an image into an array: resizes, crops and mirrors it, and scales its values to [-1, 1]."""

from __future__ import annotations

from typing import Optional, Union

import numpy as np
from PIL import Image, ImageOps

INTERPOLATIONS = {
    name.lower(): getattr(Image.Resampling, name)
    for name in ("LANCZOS", "BICUBIC", "BILINEAR", "NEAREST", "BOX", "HAMMING")
}
Resolution = Union[int, tuple[int, int]]  # the side of a square, or (height, width), in pixels


def height_width(resolution: Resolution) -> tuple[int, int]:
    """(height, width) of a resolution, in pixels."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def resize_shorter_side(image: Image.Image, resolution: Resolution, interpolation: str) -> Image.Image:
    """The image scaled to the smallest size that covers `resolution`, with its aspect ratio kept."""
    height, width = height_width(resolution)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, INTERPOLATIONS[interpolation])


def crop_box(
    size: tuple[int, int], resolution: Resolution, position: Optional[tuple[float, float]]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop of `resolution` in an image of `size` (width, height).

    `position` is (x, y) in [0, 1), from the leftmost and topmost crop to the rightmost and lowest; None gives the
    central crop.
    """
    height, width = height_width(resolution)
    margins = (size[0] - width, size[1] - height)
    if position is None:
        left, top = (round(margin / 2.0) for margin in margins)
    else:
        left, top = (int(share * (margin + 1)) for share, margin in zip(position, margins))
    return left, top, left + width, top + height


def cropped(
    image: Image.Image,
    resolution: Resolution,
    interpolation: str,
    position: Optional[tuple[float, float]],
    flip: bool,
) -> Image.Image:
    """The image resized and cropped to `resolution`, mirrored if `flip`. `position` is that of `crop_box`."""
    image = resize_shorter_side(image, resolution, interpolation)
    image = image.crop(crop_box(image.size, resolution, position))
    return ImageOps.mirror(image) if flip else image


def pixel_values(
    image: Image.Image,
    resolution: Resolution,
    interpolation: str,
    position: Optional[tuple[float, float]] = None,
    flip: bool = False,
) -> np.ndarray:
    """The RGB image resized and cropped to `resolution`, mirrored if `flip`: float32 [3, height, width] in [-1, 1].

    `position` is that of `crop_box`.
    """
    image = cropped(image, resolution, interpolation, position, flip)
    return (np.asarray(image, dtype=np.float32) / 127.5 - 1.0).transpose(2, 0, 1)
