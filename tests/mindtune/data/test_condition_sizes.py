"""Crops of conditions that have sizes of their own, and the buckets of their pairs."""

import numpy as np
import pytest

from mindtune.data.buckets import Assignment, Settings, assign
from mindtune.data.condition_sizes import condition_crop, enlarged, enlarged_note, split_by_conditions

# (width, height) of conditions with every ratio from 1:8 to 8:1.
ANY_SHAPE = [(round(1000 * ratio), 1000) for ratio in np.geomspace(1 / 8, 8, 999)]
SIZES = [(1024, 1024), (768, 1344), (512, 512), (448, 576), (768, 768), (640, 640), (256, 256)]
OTHER = (313, 1000)  # a shape that none of the images below has


@pytest.mark.parametrize(
    "image, condition",
    [
        ((1024, 768), (1024, 768)),
        ((1024, 768), (512, 384)),
        ((1024, 768), (333, 250)),  # 333.33 rounded
        ((640, 480), (4000, 3000)),
        ((1000, 700), (2008, 1400)),  # 0.4 percent wider
    ],
)
def test_a_condition_of_the_shape_of_its_image_is_cropped_like_it(image, condition):
    assert condition_crop(image, condition, (512, 640)) == (512, 640)


@pytest.mark.parametrize("size", SIZES)
def test_other_conditions_have_one_of_few_shapes_with_about_as_many_pixels(size):
    """As FLUX.1-Kontext's pipeline chooses one of 17. From 1:2 to 2:1 at most 13 percent are cut off."""
    area = size[0] * size[1]
    found = {condition: condition_crop(OTHER, condition, size) for condition in ANY_SHAPE}
    assert len(set(found.values()) - {size}) <= 17
    for (width, height), crop in found.items():
        assert crop[0] % 16 == crop[1] % 16 == 0
        assert max(crop) <= 2 * min(crop)
        assert 0.85 * area <= crop[0] * crop[1] <= 1.1 * area
        if max(width, height) <= 2 * min(width, height):
            ratio = width / height / (crop[1] / crop[0])
            assert min(ratio, 1 / ratio) >= 0.87


def test_crops_of_conditions_at_1024_pixels():
    """A landscape, a portrait and a square beside an image of another shape; 1216 * 832 is 96 percent of 1024^2."""
    assert condition_crop(OTHER, (1500, 1000), (1024, 1024)) == (832, 1216)
    assert condition_crop(OTHER, (1000, 1500), (1024, 1024)) == (1216, 832)
    assert condition_crop(OTHER, (300, 300), (768, 1344)) == (1024, 1024)
    assert condition_crop(OTHER, (4000, 1000), (1024, 1024)) == (704, 1408)  # nothing longer than 2:1


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (16, 64), (48, 80), (112, 96)])
def test_there_is_a_shape_for_the_smallest_crops(size):
    for condition in [(1, 1), (1, 500), (500, 1), (17, 16)]:
        height, width = condition_crop(OTHER, condition, size)
        assert height >= 16 and width >= 16 and height % 16 == width % 16 == 0


def test_buckets_are_the_combinations_of_both_sizes():
    """Those of an image size follow each other, and the one with the most pairs is first of them."""
    images = [(640, 640), (960, 640), (640, 640), (640, 640), (960, 640), (640, 640)]
    conditions = [(960, 640), (960, 640), None, (64, 64), None, (1920, 1280)]
    of_images = assign(images, Settings(aspect_ratio_buckets="512,512;448,576;96,16"))
    found = split_by_conditions(of_images, images, conditions)
    assert found.sizes == [(512, 512)] * 3 + [(448, 576)] * 2
    assert found.condition_sizes == [(416, 608), None, (512, 512), None, (448, 576)]
    assert found.images.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.bucket_ids.tolist() == [0, 4, 1, 2, 3, 0]


def test_a_pair_with_several_crops_of_its_image_has_as_many_of_its_condition():
    images, conditions = [(1024, 1024)], [(1500, 1000)]
    settings = Settings(resolution=[512, 1024], auto_buckets=True)
    found = split_by_conditions(assign(images, settings), images, conditions)
    assert found.sizes == [(1024, 1024), (512, 512)] and found.condition_sizes == [(832, 1216), (416, 608)]


def test_conditions_smaller_than_a_crop_of_theirs_are_named_once():
    sizes = [(512, 512), (512, 512)]
    found = Assignment(sizes, np.array([0, 1, 2, 3, 1]), np.array([0, 0, 1, 0, 0]), [(416, 608), None])
    conditions = [(608, 416), (607, 416), None, (3000, 415)]
    assert enlarged(found, conditions) == [1, 3]
    assert enlarged_note([], "--flag") == []
    assert enlarged_note(["a.png", "b.png"], "--flag") == [
        "--flag: 2 conditions are smaller than their crops, and are enlarged: those of a.png, b.png"
    ]
