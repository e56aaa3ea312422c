"""Buckets: which one is nearest to an image, and the order of their batches."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.data.buckets import (
    BucketOrder,
    Settings,
    assign,
    crop_sizes,
    cropped_share,
    describe,
    min_size,
    nearest_bucket,
    parse_buckets,
    parse_resolution,
)
from mindtune.rng import SampleStream


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


@pytest.mark.parametrize("text, expected", [("512", 512), ("768,512,768", [512, 768])])
def test_resolutions_are_parsed(text, expected):
    assert parse_resolution(text) == expected


UNEVEN = np.array([2, 0, 0, 4, 0, 2, 0, 4, 0, 0, 2, 0, 4, 4, 4, 4, 0])  # 8, 3 and 6 samples of the buckets 0, 2 and 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 20, 50])
def test_batches_follow_the_streams_of_their_buckets(size):
    """A bucket's batches follow its stream in order. After e passes bucket k has given floor(e n_k / B) batches."""
    order = BucketOrder(7, UNEVEN, size)
    members = {k: np.flatnonzero(k == UNEVEN) for k in (0, 2, 4)}
    streams = {k: SampleStream(7, f"bucket {k}", len(ids)) for k, ids in members.items()}
    given = dict.fromkeys(members, 0)
    for number in range(1, 12):
        for batch in range(sum(given.values()), sum(number * len(ids) // size for ids in members.values())):
            bucket, uses = order.at(batch)
            positions = range(given[bucket] * size, (given[bucket] + 1) * size)
            assert uses == [(members[bucket][sample], use) for sample, use in map(streams[bucket].at, positions)]
            given[bucket] += 1
        assert given == {k: number * len(ids) // size for k, ids in members.items()}
    assert order.epoch_length == 17


def test_a_batch_does_not_depend_on_earlier_calls():
    forward = [BucketOrder(1, UNEVEN, 4).at(batch) for batch in range(60)]
    order = BucketOrder(1, UNEVEN, 4)
    assert [order.at(batch) for batch in reversed(range(60))] == forward[::-1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(order.at, range(60))) == forward
    assert [BucketOrder(2, UNEVEN, 4).at(batch) for batch in range(60)] != forward


def test_buckets_alternate_at_random():
    """The order of the buckets is mixed, and differs from pass to pass."""
    order = BucketOrder(0, np.repeat([0, 1], 50), 1)
    passes = [[order.at(number * 100 + batch)[0] for batch in range(100)] for number in range(2)]
    assert passes[0] != passes[1]
    assert all(sum(turns) == 50 and 25 < np.count_nonzero(np.diff(turns)) < 75 for turns in passes)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_a_single_bucket_follows_its_stream_at_every_batch_size(size):
    order, stream = BucketOrder(3, np.zeros(7, int), size), SampleStream(3, "bucket 0", 7)
    for batch in range(30):
        assert order.at(batch) == (0, [stream.at(position) for position in range(batch * size, (batch + 1) * size)])


def test_an_order_without_samples_is_refused():
    with pytest.raises(ValueError, match="got 0 and 2"):
        BucketOrder(0, np.array([], int), 2)
    with pytest.raises(ValueError, match="got 3 and 0"):
        BucketOrder(0, np.zeros(3, int), 0)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_repeats_are_uses_in_one_pass(size):
    """As in `SampleStream`. A pass has all uses of both buckets; `place` is the position of a batch in its stream."""
    numbers = np.array([0, 1, 0, 0, 1])
    order = BucketOrder(5, numbers, size, "instance {}", repeats=4)
    assert order.epoch_length == 20
    streams = [SampleStream(5, f"instance {k}", count, 4) for k, count in enumerate((3, 2))]
    starts = [0, 0]
    for batch in range(40):
        which, first = order.place(batch)
        assert first == starts[which]
        starts[which] += size
        ids = np.flatnonzero(numbers == which)
        assert order.at(batch) == (
            which,
            [(int(ids[i]), use) for i, use in map(streams[which].at, range(first, first + size))],
        )
    assert abs(starts[0] - 1.5 * starts[1]) < 2.5 * size
