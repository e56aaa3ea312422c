"""Buckets: which one is nearest to an image, and what cropping to them cuts off."""

import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.data.buckets import (
    Row,
    Settings,
    assign,
    crop_sizes,
    cropped_share,
    describe,
    min_size,
    nearest_bucket,
    parse_buckets,
    parse_resolution,
    table,
)


def test_buckets_are_parsed():
    assert parse_buckets("672,1568; 688,1504;\n1024,1024;") == [(672, 1568), (688, 1504), (1024, 1024)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no bucket"),
        (" ; ", "no bucket"),
        ("512", "'512' is not height,width"),
        ("512,512,3", "'512,512,3' is not height,width"),
        ("512,a", "'512,a' is not height,width"),
        ("512,520", "512,520: both sides must be multiples of 16"),
        ("0,16", "0,16: both sides"),
        ("-16,16", "-16,16: both sides"),
        ("512,512;16,32;512, 512", "512,512 is given twice"),
    ],
)
def test_invalid_buckets_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        parse_buckets(text)
    assert "--aspect_ratio_buckets" in str(caught.value) and message in str(caught.value)


def test_the_nearest_bucket_by_logarithms():
    """Against the definition in floating point. Sizes are (width, height), buckets (height, width)."""
    buckets = parse_buckets("672,1568;1568,672;1024,1024;768,1280;1280,768")
    rng = np.random.default_rng(0)
    for width, height in rng.integers(10, 4000, (300, 2)).tolist():
        distances = [abs(np.log(width / height) - np.log(w / h)) for h, w in buckets]
        assert nearest_bucket((width, height), buckets) == int(np.argmin(distances))
    assert nearest_bucket((3000, 1000), buckets) == 0 and nearest_bucket((1000, 3000), buckets) == 1


def test_of_equally_near_buckets_the_first_is_chosen():
    """A square between 7:3 and 3:7, and 4:3 between 1:1 and 16:9: rounding does not decide."""
    assert nearest_bucket((500, 500), [(48, 112), (112, 48)]) == nearest_bucket((500, 500), [(112, 48), (48, 112)]) == 0
    assert nearest_bucket((400, 300), [(16, 16), (144, 256)]) == nearest_bucket((400, 300), [(144, 256), (16, 16)]) == 0


# ---- automatic sizes -----------------------------------------------------------------------------

AUTO = Settings(resolution=512, auto_buckets=True)


def shapes(image, settings=AUTO):
    """The crops of an image of (width, height), each (height, width)."""
    found = assign([image], settings)
    return [found.sizes[number] for number in found.bucket_ids]


def every_shape(resolution, step, ratio, longest):
    """The highest shape of each width, and the same on its side, by trying all sides."""
    sides = range(step, longest + 1, step)
    allowed = [(h, w) for w in sides for h in sides if h * w <= resolution**2 and max(h, w) <= ratio * min(h, w)]
    highest = [(max(h for h, other in allowed if other == w), w) for w in {w for _, w in allowed}]
    return highest + [(w, h) for h, w in highest]


@pytest.mark.parametrize("step, ratio, side", [(64, 2.0, None), (16, 2.0, None), (16, 3.0, 640), (64, 1.0, None)])
def test_an_automatic_size_cuts_off_the_least(step, ratio, side):
    """No other shape would cut off less of the image."""
    settings = AUTO._replace(bucket_step=step, bucket_max_ratio=ratio, bucket_max_side=side)
    allowed = every_shape(512, step, ratio, side or 1024)
    for image in np.random.default_rng(step).integers(1024, 4000, (40, 2)).tolist():
        (shape,) = shapes(tuple(image), settings)
        assert shape in allowed
        least = min(cropped_share(image, each) for each in allowed)
        assert cropped_share(image, shape) <= least + 1e-9


@pytest.mark.parametrize(
    "image, expected",
    [
        ((2000, 2000), (512, 512)),
        ((1500, 1000), (384, 640)),
        ((1000, 1500), (640, 384)),
        ((9000, 1000), (320, 640)),
        ((512, 512), (512, 512)),
    ],
)
def test_automatic_sizes_of_common_images(image, expected):
    assert shapes(image) == [expected]


@pytest.mark.parametrize("ratio", [1.7, 2.0, 2.33, 2.5, 3.7])
def test_automatic_sizes_use_most_of_the_pixels_at_every_ratio(ratio):
    """Multiples of 64 cost up to a fifth of them. At 2.5, images of 7:3 were cropped to 192x448, 8 % of 1024x1024."""
    settings = AUTO._replace(resolution=1024, bucket_max_ratio=ratio)
    for image in np.random.default_rng(0).integers(1100, 9000, (200, 2)).tolist() + [[2100, 900]]:
        ((height, width),) = shapes(tuple(image), settings)
        assert height * width >= 0.8 * 1024**2, image


@pytest.mark.parametrize("resolution", [112, 512, 640, 768, 1024])
def test_an_image_on_its_side_has_the_same_size_on_its_side(resolution):
    settings = AUTO._replace(resolution=resolution, bucket_step=16)
    for image in np.random.default_rng(0).integers(2100, 5000, (30, 2)).tolist():
        ((height, width),) = shapes(tuple(image), settings)
        assert shapes(tuple(image[::-1]), settings) == [(width, height)]


@pytest.mark.parametrize(
    "values", [{"resolution": 112, "bucket_max_ratio": 1.5}, {"resolution": 768, "bucket_step": 512}]
)
def test_there_is_always_a_square(values):
    settings = AUTO._replace(**{"bucket_max_ratio": 1.9, **values})
    side = settings.resolution // settings.bucket_step * settings.bucket_step
    assert shapes((2000, 2000), settings) == [(side, side)]


def test_several_resolutions_do_not_enlarge_an_image():
    """An image is used at every resolution that it covers; below the smallest one it is refused before."""
    settings = AUTO._replace(resolution=[512, 768, 1024])
    assert sorted(shapes((1024, 1024), settings)) == [(512, 512), (768, 768), (1024, 1024)]
    assert sorted(shapes((900, 900), settings)) == [(512, 512), (768, 768)]
    assert shapes((512, 600), settings) == [(576, 448)]
    assert shapes((500, 500), settings) == []
    assert min_size(settings)((500, 500)) == (512, 512)
    assert crop_sizes(settings) == [(1024, 1024)] and settings.largest() == (1024, 1024)


def test_the_most_frequent_size_comes_first():
    images = [(1500, 1000), (1000, 1000), (1500, 1000), (1000, 1500)]
    found = assign(images, AUTO)
    assert found.sizes == [(384, 640), (512, 512), (640, 384)]
    assert found.images.tolist() == [0, 1, 2, 3] and found.bucket_ids.tolist() == [0, 1, 0, 2]
    lines = describe(images, found).splitlines()
    assert lines[1].split() == ["384,640", "2", "10.0%", "10.0%"]


def test_the_table_says_what_is_cut_off():
    """3:1 in a size of 2:1 keeps 2/3, 2:1 keeps all."""
    found = assign([(3000, 1000), (2000, 1000)], AUTO)
    assert describe([(3000, 1000), (2000, 1000)], found).splitlines()[1].split()[-2:] == ["16.7%", "33.3%"]


def test_the_table_has_a_column_for_conditions_only_if_they_differ_from_the_images():
    rows = [Row((64, 96), 3, 0.125, 0.25, (64, 96)), Row((64, 96), 12, 0.0, 0.0, None)]
    assert table(rows).splitlines() == [
        "height,width   condition        images  cropped away  at most",
        "64,96          64,96                 3         12.5%    25.0%",
        "64,96          none                 12          0.0%     0.0%",
    ]
    plain = "height,width     images  cropped away  at most"
    assert table(rows[:1]).splitlines()[0] == plain
    assert table([row._replace(condition=None) for row in rows]).splitlines()[0] == plain
    assert table([rows[0]._replace(condition=(80, 64))]).splitlines()[1].split()[:3] == ["64,96", "80,64", "3"]


@pytest.mark.parametrize("text, expected", [("512", 512), ("768,512,768", [512, 768])])
def test_resolutions_are_parsed(text, expected):
    assert parse_resolution(text) == expected
