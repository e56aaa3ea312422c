"""Condition images for validation and inference."""

from __future__ import annotations

from typing import Optional

import numpy as np
from PIL import Image, ImageOps

from mindtune.cli import UserError, printable
from mindtune.data.image_problems import open_image
from mindtune.data.images import UnusableImage, choose_background, flatten, has_single_colour, measure_visibility


def require_condition(path: str, flag: str) -> Image.Image:
    """The decoded image, in its own mode. Raises UserError naming `flag` if it cannot be read."""
    try:
        return open_image(path)
    except ValueError as error:
        raise UserError(f"{flag} {printable(path)}: cannot be read as an image ({error}).") from None


def condition_image(
    path: str,
    flag: str,
    resolution: int,
    multiple: int = 16,
    background: Optional[str] = None,
    size: Optional[tuple[int, int]] = None,
) -> Image.Image:
    """A condition image in RGB. Its shorter side is `resolution`, its longer side the nearest multiple of `multiple`.

    With `size`, (height, width) in pixels, it has this size instead, and the middle of the image is kept. Transparent
    pixels are put on `background`, or if it is None on the colour that `choose_background` finds for this image. Raises
    UserError naming `flag` if the image cannot be read.
    """
    image = require_condition(path, flag)
    if background is None:
        visibility = measure_visibility(image)
        background = choose_background(visibility) if visibility else "white"
        if background == "black":
            print(f"{flag} {printable(path)}: transparent, put on black; on white its drawing would not be visible")
    try:
        image = flatten(image, background)
    except UnusableImage as error:
        raise UserError(f"{flag} {printable(path)}: cannot be read as an image ({error}).") from None
    if has_single_colour(image):
        print(f"{flag} {printable(path)}: blank, all pixels have the same colour")
    if size is None:
        width, height = (
            max(resolution, round(side * resolution / min(image.size) / multiple) * multiple) for side in image.size
        )
        size = (height, width)
    return ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)


def mask_image(path: str, flag: str, size: tuple[int, int]) -> Image.Image:
    """A mask in gray, of `size` (height, width) in pixels. Raises UserError naming `flag` if it cannot be read."""
    return condition_image(path, flag, 0, 1, "black", size).convert("L")


def condition_pixels(image: Image.Image) -> np.ndarray:
    """An RGB image as the input of a UNet's ControlNet: float32 [1, 3, H, W] in [0, 1]."""
    return (np.asarray(image, dtype=np.float32) / 255.0).transpose(2, 0, 1)[None]
