"""Grids of labelled images."""

import numpy as np
import pytest
from PIL import Image

from mindtune.data.grids import image_grid, save_image
from mindtune.data.labels import LINE_HEIGHT


def random_image(width=200, height=150, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image, left, top, width, height):
    return np.asarray(image)[top : top + height, left : left + width]


def test_a_grid_places_rows_and_columns():
    """Two rows, of which the second is shorter: its rest stays white."""
    rows = [[random_image(seed=0), random_image(seed=1), random_image(seed=2)], [random_image(seed=3)]]
    sheet = image_grid(rows)
    assert sheet.size == (600, 300)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            np.testing.assert_array_equal(pixels(sheet, 200 * x, 150 * y, 200, 150), np.asarray(image))
    assert (pixels(sheet, 200, 150, 400, 150) == 255).all()


@pytest.mark.parametrize(
    "labels, lines",
    [
        (["one", "two"], [1, 1]),
        (["a long prompt " * 20, "short"], [10, 1]),
        (["short", "a long prompt " * 20], [1, 10]),
        (["", "数 ☃ \n"], [0, 1]),
        (["红色围巾的猫" * 20, "Ấ\u0301\u0301\u0301\u0301"], [9, 1]),
    ],
)
def test_every_row_is_under_its_label_and_as_high_as_its_own(labels, lines):
    """Labels never reach into images, and a long label leaves no gap in the other rows."""
    rows = [[random_image(seed=0)], [random_image(seed=1)]]
    sheet = image_grid(rows, labels)
    assert sheet.size == (200, LINE_HEIGHT * sum(lines) + 2 * 150)
    top = 0
    for row, label, count in zip(rows, labels, lines):
        band = LINE_HEIGHT * count
        assert (pixels(sheet, 0, top, 200, band) < 128).any() == bool(label)
        np.testing.assert_array_equal(pixels(sheet, 0, top + band, 200, 150), np.asarray(row[0]))
        top += band + 150


@pytest.mark.parametrize(
    "one, other", [("猫", "狗"), ("ネコ", "イヌ"), ("고양이", "강아지"), ("кот", "пёс"), ("🐱", "🐶")]
)
def test_labels_in_other_scripts_differ(one, other):
    """A font draws the same box for all characters that it does not have."""
    sheets = [np.asarray(image_grid([[random_image()]], [label])) for label in (one, other)]
    assert sheets[0].shape == sheets[1].shape and not np.array_equal(*sheets)


def test_small_images_are_enlarged_pixel_by_pixel():
    image = random_image(16, 24)
    sheet = image_grid([[image, image]])
    scale = sheet.width // 32
    assert scale > 1 and sheet.size == (32 * scale, 24 * scale)
    np.testing.assert_array_equal(np.asarray(sheet)[::scale, ::scale], np.tile(np.asarray(image), (1, 2, 1)))
    np.testing.assert_array_equal(
        np.asarray(sheet)[scale - 1 :: scale, scale - 1 :: scale], np.tile(np.asarray(image), (1, 2, 1))
    )


def test_save_image_creates_the_folder_and_a_png(tmp_path):
    image = random_image(8, 8)
    path = save_image(image, tmp_path / "new" / "folder" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert Image.open(path).format == "PNG"
