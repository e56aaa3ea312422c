"""Condition images for validation and inference."""

from __future__ import annotations

from typing import Optional

import numpy as np
from PIL import Image, ImageOps

from mindtune.cli import UserError, shown
from mindtune.data.image_problems import opened
from mindtune.data.images import UnusableImage, flatten, ground, ink, is_flat


def require_condition(path: str, flag: str) -> Image.Image:
    """The decoded image, in its own mode. Raises UserError naming `flag` if it cannot be read."""
    try:
        return opened(path)
    except ValueError as error:
        raise UserError(f"{flag} {shown(path)}: cannot be read as an image ({error}).") from None


def condition_image(
    path: str, flag: str, resolution: int, multiple: int = 16, background: Optional[str] = None
) -> Image.Image:
    """An image as a condition to draw with: its shorter side `resolution`, the longer one the nearest multiple of `multiple`.

    Transparent pixels are laid on `background` as in training; without one on what shows this drawing, by the rule for data sets. Raises
    UserError naming `flag` if it cannot be read.
    """
    image = require_condition(path, flag)
    shades = ink(image)
    if background is None and shades and ground(shades) == "black":
        print(f"{flag} {shown(path)}: laid on black; on white its drawing would not be seen")
    try:
        image = flatten(image, background or (ground(shades) if shades else "white"))
    except UnusableImage as error:
        raise UserError(f"{flag} {shown(path)}: cannot be read as an image ({error}).") from None
    if is_flat(image):
        print(f"{flag} {shown(path)}: blank, of one colour throughout")
    width, height = (
        max(resolution, round(side * resolution / min(image.size) / multiple) * multiple) for side in image.size
    )
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def condition_pixels(image: Image.Image) -> np.ndarray:
    """A picture as what a UNet's ControlNet reads: float32 [1, 3, H, W] in [0, 1]."""
    return (np.asarray(image, dtype=np.float32) / 255.0).transpose(2, 0, 1)[None]
