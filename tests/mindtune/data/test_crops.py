"""Resizing, cropping and mirroring of images, against their own pixels."""

import numpy as np
import pytest
from PIL import Image

from mindtune.data.columns import Source
from mindtune.data.crops import INTERPOLATIONS, crop_box, pixel_values, resize_shorter_side
from mindtune.data.pairs import load_pairs

from .image_files import noise
from .pair_files import write_lines

WHITE = (255, 255, 255)


def test_the_shorter_side_becomes_the_resolution_and_the_aspect_ratio_is_kept():
    for width in (*range(16, 40), 333, 1000):
        for height in (16, 17, 31, 64, 999):
            found = resize_shorter_side(Image.new("L", (width, height)), 24, "nearest").size
            assert min(found) == 24
            assert max(found) == pytest.approx(24 * max(width, height) / min(width, height), abs=0.5), (width, height)


def test_an_image_of_the_right_size_is_not_resized():
    image = noise(24, 30)
    assert resize_shorter_side(image, 24, "lanczos") is image


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_every_interpolation_keeps_a_single_colour(name):
    shown = np.asarray(resize_shorter_side(Image.new("RGB", (50, 37), (10, 200, 30)), 16, name))
    assert shown.shape == (16, 22, 3) and (shown == (10, 200, 30)).all()


@pytest.mark.parametrize(
    "size, left, top",
    [((8, 8), 0, 0), ((12, 8), 2, 0), ((8, 14), 0, 3), ((11, 8), 2, 0), ((8, 9), 0, 0), ((13, 8), 2, 0)],
)
def test_the_central_crop_rounds_like_torchvision(size, left, top):
    """For margins of 3, 1 and 5 pixels, halves are rounded to the even number."""
    assert crop_box(size, 8, None) == (left, top, left + 8, top + 8)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 6, 7, 1000])
def test_a_random_crop_stays_inside_and_reaches_both_ends(room):
    almost_one = float(np.nextafter(1.0, 0.0))
    assert crop_box((8 + room, 8), 8, (0.0, 0.0)) == (0, 0, 8, 8)
    assert crop_box((8 + room, 8), 8, (almost_one, almost_one)) == (room, 0, room + 8, 8)
    assert crop_box((8, 8 + room), 8, (almost_one, almost_one)) == (0, room, 8, room + 8)


def test_every_position_of_a_random_crop_is_equally_likely():
    lefts = [crop_box((11, 8), 8, (u, 0.0))[0] for u in (np.arange(400) + 0.5) / 400]
    assert np.bincount(lefts).tolist() == [100, 100, 100, 100]


@pytest.mark.parametrize("width, height", [(11, 8), (8, 13), (8, 8)])
@pytest.mark.parametrize("u", [None, (0.0, 0.0), (0.6, 0.4), (0.999, 0.999)])
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_are_the_crop_from_minus_one_to_one(width, height, u, flip):
    """Compared pixel by pixel with the image, which needs no resizing at this size."""
    image = noise(width, height)
    found = pixel_values(image, 8, "lanczos", u, flip)
    left, top, _, _ = crop_box(image.size, 8, u)
    assert found.dtype == np.float32 and found.shape == (3, 8, 8)
    for channel, y, x in np.ndindex(3, 8, 8):
        value = image.getpixel((left + (7 - x if flip else x), top + y))[channel]
        assert found[channel, y, x] == pytest.approx(value / 127.5 - 1.0, abs=1e-6)


def test_black_is_minus_one_and_white_is_one():
    image = Image.new("RGB", (8, 8))
    image.paste(WHITE, (0, 0, 4, 8))
    assert pixel_values(image, 8, "lanczos")[:, :, [0, 7]].reshape(-1, 2).tolist() == [[1.0, -1.0]] * 24


def test_a_larger_image_is_resized_before_the_crop():
    """An image enlarged in 4x4 tiles; the box filter restores it exactly."""
    small = noise(11, 8)
    large = small.resize((44, 32), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(pixel_values(large, 8, "box"), pixel_values(small, 8, "box"))


@pytest.mark.parametrize("height, width", [(24, 24), (16, 40), (40, 16), (17, 31), (31, 30)])
def test_an_image_just_covers_height_and_width(height, width):
    """One side fits exactly, the other is at least as long, and the aspect ratio is kept."""
    for size in ((16, 16), (17, 40), (333, 100), (31, 32), (24, 999), (width, height), (width * 3, height * 3)):
        found = resize_shorter_side(Image.new("L", size), (height, width), "nearest").size
        scale = max(width / size[0], height / size[1])
        assert found[0] >= width and found[1] >= height and (found[0] == width or found[1] == height)
        assert found == pytest.approx((size[0] * scale, size[1] * scale), abs=0.5)


def test_one_number_is_a_square():
    image = noise(37, 29)
    for u, flip in ((None, False), ((0.7, 0.2), True)):
        np.testing.assert_array_equal(
            pixel_values(image, 16, "lanczos", u, flip), pixel_values(image, (16, 16), "lanczos", u, flip)
        )


@pytest.mark.parametrize("u", [None, (0.0, 0.0), (0.6, 0.4), (0.999, 0.999)])
@pytest.mark.parametrize("size", [(12, 8), (17, 8), (12, 13)])
def test_the_crop_has_height_and_width(size, u):
    """8 high and 12 wide; central, or at the given share of the margin, including its last position."""
    left, top, right, bottom = crop_box(size, (8, 12), u)
    assert (right - left, bottom - top) == (12, 8)
    room = (size[0] - 12, size[1] - 8)
    assert (left, top) == (
        tuple(round(r / 2) for r in room) if u is None else tuple(int(v * (r + 1)) for v, r in zip(u, room))
    )


def test_pixels_of_a_crop_that_is_not_square():
    """Compared pixel by pixel with the image, which needs no resizing at this size."""
    image = noise(15, 8)
    found = pixel_values(image, (8, 12), "lanczos", (0.99, 0.5), flip=True)
    assert found.dtype == np.float32 and found.shape == (3, 8, 12)
    for channel, y, x in np.ndindex(3, 8, 12):
        assert found[channel, y, x] == pytest.approx(image.getpixel((3 + 11 - x, y))[channel] / 127.5 - 1.0, abs=1e-6)


@pytest.mark.parametrize("resolution", [24, (16, 32), (33, 17)])
@pytest.mark.parametrize("u, flip", [(None, False), ((0.3, 0.9), False), ((0.99, 0.0), True)])
def test_target_and_condition_are_cropped_and_flipped_together(tmp_path, resolution, u, flip):
    """The condition is the same image in another format: its pixels must be the same, and `flip` must mirror them."""
    source = noise(51, 47)
    source.save(tmp_path / "a.png")
    source.save(tmp_path / "b.bmp")
    path = write_lines(tmp_path / "p.jsonl", [{"image": "a.png", "conditioning_image": "b.bmp", "text": ""}])
    pair = load_pairs(Source(jsonl_for_train=str(path), cache_dir=str(tmp_path / "cache")))[0]
    image, condition = (pixel_values(sample.open(), resolution, "lanczos", u, flip) for sample in pair[:2])
    np.testing.assert_array_equal(image, condition)
    np.testing.assert_array_equal(image[:, :, ::-1], pixel_values(source, resolution, "lanczos", u, not flip))
