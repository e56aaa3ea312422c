"""Images for the tests of this folder, and their comparison."""

import io

import numpy as np
from PIL import Image


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width=16, height=16, seed=0):
    file = io.BytesIO()
    noise(width, height, seed).save(file, "png")
    return file.getvalue()


def smooth(width=64, height=48):
    """A gradient, which lossy formats change little. All four corners differ."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3, y * 4, 255 - x - y], 2).astype(np.uint8))


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(image, expected, tolerance=0):
    assert image.size == expected.size
    np.testing.assert_allclose(np.asarray(image.convert("RGB"), int), np.asarray(expected, int), atol=tolerance)
