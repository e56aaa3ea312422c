"""Masks of what a model learns to fill in: those of a data set, or random ones, drawn anew each time a pair is used."""

from __future__ import annotations

import math
from typing import Optional, Union

import numpy as np
from PIL import Image, ImageDraw

from mindtune.data.crops import cropped
from mindtune.data.draws import HeldOutDraws, TrainingDraws
from mindtune.data.masks import read_mask
from mindtune.data.pairs import Pair

Size = tuple[int, int]  # (height, width) in pixels

WHOLE = 0.1  # the share of random masks that cover the whole image
LEAST, MOST = 0.1, 0.7  # the shares of the image that the others cover
ENOUGH = 0.6  # no shape is added above this share, so that there is room for one below MOST


def fill_mask(
    pair: Pair,
    size: Size,
    draws: Union[TrainingDraws, HeldOutDraws],
    crop: Optional[tuple[float, float]] = None,
    flip: bool = False,
) -> np.ndarray:
    """The mask of a pair's crop to `size`, float32 [1, H, W]: 1 where the image is to be filled, 0 elsewhere.

    It is the pair's condition, white where to fill, with the image's `crop` (the position of `crops.crop_box`) and
    `flip`; gray becomes white from one half on, and transparent pixels are kept, as in validation.
    Without a condition it is a `random_mask` of these draws.
    """
    if pair.condition is None:
        return random_mask(size, draws.generator("fill mask"))
    mask = _binary(read_mask(pair.condition))
    # Averages of black and white become black or white again.
    mask = _binary(cropped(mask, size, "box", crop, flip))
    return _values(mask)


def _binary(mask: Image.Image) -> Image.Image:
    return mask.point(lambda value: 255 if value >= 128 else 0)


def random_mask(size: Size, generator: np.random.Generator) -> np.ndarray:
    """A random mask of `size`, float32 [1, H, W]: 1 inside of rectangles, ellipses and brush strokes, 0 outside.

    One in ten covers the whole image, the others 10 to 70 percent of it, with shapes of one kind or of all. Source of
    large boxes and wide strokes: Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions"
    (arXiv 2109.07161), section 3.3. The numbers are our own.
    """
    if generator.random() < WHOLE:
        return np.ones((1, *size), dtype=np.float32)
    mask, share = Image.new("L", size[::-1]), 0.0
    wanted = generator.uniform(LEAST, ENOUGH)
    kind = generator.integers(len(SHAPES) + 1)
    while share < wanted:
        more = mask.copy()
        draw_shape = SHAPES[kind if kind < len(SHAPES) else generator.integers(len(SHAPES))]
        draw_shape(ImageDraw.Draw(more), size, generator)
        share_of_more = more.histogram()[255] / (more.width * more.height)
        if share_of_more <= MOST:
            mask, share = more, share_of_more
    return _values(mask)


def _values(mask: Image.Image) -> np.ndarray:
    return (np.asarray(mask, dtype=np.float32) / 255.0)[None]


def _box(size: Size, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), inclusive, of a box with 10 to 80 percent of each side.

    It may be partly outside of the image, so that it covers corners as often as the middle.
    """
    spans = []
    for side in size[::-1]:
        length = max(1, int(side * generator.uniform(0.1, 0.8)))
        start = int(generator.integers(1 - length, side))
        spans.append((start, start + length - 1))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _draw_rectangle(draw: ImageDraw.ImageDraw, size: Size, generator: np.random.Generator) -> None:
    draw.rectangle(_box(size, generator), fill=255)


def _draw_ellipse(draw: ImageDraw.ImageDraw, size: Size, generator: np.random.Generator) -> None:
    draw.ellipse(_box(size, generator), fill=255)


def _draw_stroke(draw: ImageDraw.ImageDraw, size: Size, generator: np.random.Generator) -> None:
    """A stroke of up to 8 straight pieces with round ends, 5 to 20 percent of the shorter side wide."""
    shorter = min(size)
    radius = max(1.0, shorter * generator.uniform(0.025, 0.1))
    x, y = generator.random(2) * size[::-1]
    direction = generator.uniform(0, 2 * math.pi)
    _draw_disc(draw, x, y, radius)
    for _ in range(generator.integers(1, 9)):
        length = shorter * generator.uniform(0.1, 0.4)
        end = (x + length * math.cos(direction), y + length * math.sin(direction))
        draw.line([(x, y), end], fill=255, width=round(2 * radius))
        x, y = end
        _draw_disc(draw, x, y, radius)
        direction += generator.uniform(-0.5, 0.5) * math.pi


def _draw_disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


SHAPES = (_draw_rectangle, _draw_ellipse, _draw_stroke)
