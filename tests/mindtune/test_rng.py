"""Random numbers by key, and the order of samples."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mindtune.rng import SampleStream, generator, normal


def test_equal_keys_give_equal_numbers():
    np.testing.assert_array_equal(normal(3, "noise", 1, 2, shape=(4, 5)), normal(3, "noise", 1, 2, shape=(4, 5)))


@pytest.mark.parametrize(
    "other", [(4, "noise", 1, 23), (3, "crop", 1, 23), (3, "noise", 12, 3), (3, "noise", 1), (3, "noise", 1, 24)]
)
def test_other_keys_give_other_numbers(other):
    """Also (12, 3) and (1, 23), which would be equal without a separator between the ids."""
    assert np.abs(normal(3, "noise", 1, 23, shape=(50,)) - normal(*other, shape=(50,))).min() > 0


def test_numpy_and_python_ids_are_equal():
    assert generator(0, "x", np.int64(7)).random() == generator(0, "x", 7).random()


def test_the_numbers_never_change():
    """A change would break resuming existing runs: another scheme needs new names."""
    assert generator(0, "noise").random(3).tolist() == [0.044808053403812, 0.401198620485268, 0.6440272161009764]
    assert generator(2**31, "u", 1).integers(0, 1000, 6).tolist() == [889, 895, 966, 621, 611, 515]
    expected = [-2.6218574, -0.24229954, 0.2116946, 0.37157357]
    np.testing.assert_array_equal(normal(42, "instance noise", 7, 3, shape=(4,)), np.float32(expected))
    assert [SampleStream(0, "instance", 10).at(i)[0] for i in range(12)] == [0, 8, 1, 6, 3, 5, 4, 2, 7, 9, 9, 3]


def test_normal_numbers_are_standard_normal_float32():
    values = normal(0, "noise", 0, shape=(100, 1000))
    assert values.dtype == np.float32 and values.shape == (100, 1000)
    moments = [values.mean(), values.std(), (values**3).mean(), (values**4).mean()]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)


def test_different_keys_are_uncorrelated():
    rows = np.stack([normal(0, "noise", sample, shape=(10_000,)) for sample in range(8)])
    assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 0.05


# ---- the order of samples ------------------------------------------------------------------------


@pytest.mark.parametrize("count, repeats", [(1, 1), (5, 1), (5, 3), (1, 4)])
def test_a_pass_uses_every_sample_repeats_times(count, repeats):
    stream = SampleStream(0, "instance", count, repeats)
    for number in range(4):
        seen = Counter(stream.at(number * count * repeats + i)[0] for i in range(count * repeats))
        assert seen == dict.fromkeys(range(count), repeats)


@pytest.mark.parametrize("count, repeats", [(1, 1), (5, 1), (5, 3), (3, 7)])
def test_the_use_count(count, repeats):
    stream, used = SampleStream(0, "instance", count, repeats), Counter()
    for position in range(4 * count * repeats):
        sample, use = stream.at(position)
        assert use == used[sample], position
        used[sample] += 1


def test_every_pass_has_another_order():
    stream = SampleStream(0, "instance", 20)
    passes = {tuple(stream.at(20 * number + i)[0] for i in range(20)) for number in range(6)}
    assert len(passes) == 6 and tuple(range(20)) not in passes


def test_every_sample_can_be_first():
    firsts = Counter(SampleStream(seed, "instance", 4).at(0)[0] for seed in range(400))
    assert all(60 < firsts[sample] < 140 for sample in range(4))


def test_seed_and_purpose_change_the_order():
    def order(*key):
        return [SampleStream(*key, 20).at(i)[0] for i in range(20)]

    assert order(0, "instance") != order(1, "instance") and order(0, "instance") != order(0, "class")


def test_the_batch_size_does_not_change_the_order():
    """Twelve positions as 12 x 1, 4 x 3 or 2 x 6, read in reverse by separate streams."""
    expected = [SampleStream(0, "instance", 5, 2).at(i) for i in range(12)]
    for size in (1, 3, 6):
        found = {}
        for batch in reversed(range(12 // size)):
            stream = SampleStream(0, "instance", 5, 2)
            found[batch] = [stream.at(batch * size + i) for i in range(size)]
        assert [pair for batch in sorted(found) for pair in found[batch]] == expected


def test_threads_read_the_same_stream():
    """In random order, over more passes than are cached."""
    stream = SampleStream(0, "instance", 6, 2)
    expected = [stream.at(i) for i in range(12 * 30)]
    positions = np.random.default_rng(0).permutation(np.repeat(np.arange(12 * 30), 4)).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(SampleStream(0, "instance", 6, 2).at, positions))
    assert found == [expected[position] for position in positions]


@pytest.mark.parametrize("count, repeats", [(0, 1), (3, 0)])
def test_an_empty_stream_is_rejected(count, repeats):
    with pytest.raises(ValueError, match="at least one"):
        SampleStream(0, "instance", count, repeats)
