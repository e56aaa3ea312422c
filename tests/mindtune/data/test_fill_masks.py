"""Masks of what is to be filled: cropped and flipped like the image, or random."""

import io

import numpy as np
import pytest
from PIL import Image

from mindtune import rng
from mindtune.data.crops import pixel_values
from mindtune.data.draws import HeldOutDraws, TrainingDraws
from mindtune.data.fill_masks import fill_mask, random_mask
from mindtune.data.image_sample import Sample
from mindtune.data.pairs import Pair


def sample(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return Sample("a", file.getvalue(), **options)


def pair_of(mask):
    return Pair(sample(np.zeros((8, 8, 3), np.uint8)), mask, "")


def halves(width, height):
    """A mask whose left third is white, as in the image below."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 3] = 255
    return pixels


# ---- masks of the data ---------------------------------------------------------------------------


def test_white_is_filled_and_gray_becomes_white_from_one_half_on():
    pixels = np.array([[0, 127], [128, 255]], np.uint8).repeat(16, 0).repeat(16, 1)
    found = fill_mask(pair_of(sample(pixels)), (32, 32), TrainingDraws(0, "pair", 0, 0))
    assert found.shape == (1, 32, 32) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], (pixels >= 128).astype(np.float32))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, (0.0, 0.0), (0.7, 0.2), (0.999, 0.999)])
@pytest.mark.parametrize("width, height, size", [(90, 40, (32, 48)), (30, 61, (48, 48)), (48, 32, (32, 48))])
def test_a_mask_is_cropped_and_flipped_exactly_like_the_image(width, height, size, crop, flip):
    """An image that is its own mask is white where the mask is 1; halves of pixels lie at edges alone."""
    generator = np.random.default_rng(0)
    pixels = (generator.random((height // 10, width // 10)) < 0.5).astype(np.uint8) * 255
    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))
    mask = fill_mask(pair_of(sample(pixels)), size, TrainingDraws(0, "pair", 0, 0), crop, flip)
    assert mask.shape == (1, *size) and set(np.unique(mask)) == {0.0, 1.0}
    image = pixel_values(Image.fromarray(pixels).convert("RGB"), size, "box", crop, flip)[0]
    np.testing.assert_array_equal(mask[0], (image >= 0).astype(np.float32))


def test_no_gray_is_left_after_scaling():
    """Stripes of one pixel, which average to gray at half of the size and at other scales."""
    stripes = np.zeros((100, 100), np.uint8)
    stripes[:, ::2] = 255
    for side in (96, 64, 48, 160):
        found = fill_mask(pair_of(sample(stripes)), (side, side), TrainingDraws(0, "pair", 0, 0))
        assert set(np.unique(found)) <= {0.0, 1.0}


def test_strokes_on_a_transparent_mask_are_filled():
    """White ones, as an editor saves them. The transparent rest is kept on any background of the data's conditions."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:8] = 255
    found = fill_mask(pair_of(sample(pixels, background="white")), (16, 16), TrainingDraws(0, "pair", 0, 0))
    assert found[0, 4:8].all() and found.sum() == 4 * 16


# ---- random masks --------------------------------------------------------------------------------


def random_masks(size, count):
    return [random_mask(size, rng.generator(0, "test", number)) for number in range(count)]


@pytest.mark.parametrize("size, count", [((64, 64), 400), ((16, 16), 200), ((32, 96), 200), ((512, 384), 20)])
def test_random_masks_are_binary_and_cover_a_tenth_to_seven_tenths_or_all(size, count):
    found = random_masks(size, count)
    assert all(mask.shape == (1, *size) and mask.dtype == np.float32 for mask in found)
    assert all(set(np.unique(mask)) <= {0.0, 1.0} for mask in found)
    shares = np.array([mask.mean() for mask in found])
    partial = shares[shares < 1.0]
    assert partial.min() >= 0.1 and partial.max() <= 0.7
    assert partial.max() - partial.min() > 0.4
    assert len({mask.tobytes() for mask in found if not mask.all()}) > 0.95 * len(partial)


def test_a_tenth_of_random_masks_cover_the_whole_image():
    """Of 1000, within four standard deviations."""
    whole = sum(mask.all() for mask in random_masks((16, 16), 1000))
    assert abs(whole - 100) < 38


def test_corners_and_edges_are_masked_nearly_as_often_as_the_middle():
    """Each pixel in 33 to 46 percent of many masks; of these 500, within four standard deviations of that."""
    found = [mask[0] for mask in random_masks((32, 32), 560) if not mask.all()]
    shares = np.mean(found, axis=0)
    assert len(found) > 480 and shares.min() > 0.24 and shares.max() < 0.55


def test_a_pair_without_a_condition_has_another_random_mask_at_each_use():
    """It is a function of seed, pair and use alone, as a resumed run needs."""
    keys = [(0, "pair", 1, 0), (0, "pair", 1, 1), (0, "pair", 2, 0), (1, "pair", 1, 0)]
    found = [fill_mask(pair_of(None), (48, 32), TrainingDraws(*key)) for key in keys]
    assert len({mask.tobytes() for mask in found}) == len(keys)
    for key, mask in zip(keys, found):
        np.testing.assert_array_equal(fill_mask(pair_of(None), (48, 32), TrainingDraws(*key)), mask)
        expected = random_mask((48, 32), rng.generator(key[0], "pair fill mask", *key[2:]))
        np.testing.assert_array_equal(mask, expected)


def test_a_held_out_pair_has_the_same_random_mask_at_all_timesteps():
    found = [fill_mask(pair_of(None), (32, 32), HeldOutDraws(0, 5, timestep)) for timestep in (10, 900)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != fill_mask(pair_of(None), (32, 32), HeldOutDraws(0, 6, 10))).any()
