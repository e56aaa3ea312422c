"""From an image to an array: resizing, cropping, mirroring, float32 in [-1, 1]."""

from __future__ import annotations

from typing import Optional, Union

import numpy as np
from PIL import Image, ImageOps

INTERPOLATIONS = {
    name.lower(): getattr(Image.Resampling, name)
    for name in ("LANCZOS", "BICUBIC", "BILINEAR", "NEAREST", "BOX", "HAMMING")
}


Resolution = Union[int, tuple[int, int]]  # the side of a square, or (height, width)


def height_width(resolution: Resolution) -> tuple[int, int]:
    """(height, width) in pixels of a resolution given as one number, for a square, or as the two."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def resize_shorter_side(image: Image.Image, resolution: Resolution, interpolation: str) -> Image.Image:
    """Scaled so that it just covers `resolution`: one side fits, the other is as long or longer (of a square: the shorter side fits)."""
    height, width = height_width(resolution)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, INTERPOLATIONS[interpolation])


def crop_box(
    size: tuple[int, int], resolution: Resolution, u: Optional[tuple[float, float]]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of `resolution` in an image of `size`: central, or at u = (x, y) in [0, 1) of the free room."""
    height, width = height_width(resolution)
    room = (size[0] - width, size[1] - height)
    left, top = (round(r / 2.0) for r in room) if u is None else (int(v * (r + 1)) for v, r in zip(u, room))
    return left, top, left + width, top + height


def pixel_values(
    image: Image.Image,
    resolution: Resolution,
    interpolation: str,
    u: Optional[tuple[float, float]] = None,
    flip: bool = False,
) -> np.ndarray:
    """RGB picture to float32 [3, height, width] in [-1, 1]: `resize_shorter_side`, crop (`crop_box`), mirror if `flip`."""
    image = resize_shorter_side(image, resolution, interpolation)
    image = image.crop(crop_box(image.size, resolution, u))
    if flip:
        image = ImageOps.mirror(image)
    return (np.asarray(image, dtype=np.float32) / 127.5 - 1.0).transpose(2, 0, 1)
