"""The draws of a use: functions of their keys alone, which the reproducible results of earlier versions depend on."""

import numpy as np
import pytest

from mindtune import rng
from mindtune.data.captions import Settings
from mindtune.data.draws import HeldOutDraws, TrainingDraws

SHAPE = (4, 3, 2)


@pytest.mark.parametrize("group", ["instance", "class", "pair"])
def test_training_draws_come_from_the_generators_of_their_keys(group):
    """The keys are part of what a resumed run repeats: with other ones it would see other noise."""
    draws = TrainingDraws(7, group, 3, 2)
    x, y, flip = rng.generator(7, f"{group} crop and flip", 3, 2).random(3)
    assert draws.crop(centered=False) == (x, y) and draws.crop(centered=True) is None
    assert draws.flip(enabled=True) == (flip < 0.5) and draws.flip(enabled=False) is False
    assert draws.timestep(lambda generator: generator.integers(1000)) == rng.generator(
        7, f"{group} timestep", 3, 2
    ).integers(1000)
    for purpose in ("posterior", "noise"):
        expected = rng.normal(7, f"{group} {purpose}", 3, 2, shape=SHAPE)
        np.testing.assert_array_equal(draws.normal(purpose, SHAPE), expected)
    expected = rng.normal(7, "condition posterior", 3, 2, shape=SHAPE)
    np.testing.assert_array_equal(draws.normal("condition posterior", SHAPE), expected)


def test_draws_repeat_and_differ_between_uses_samples_seeds_and_groups():
    keys = [
        (0, "instance", 0, 0),
        (1, "instance", 0, 0),
        (0, "class", 0, 0),
        (0, "instance", 1, 0),
        (0, "instance", 0, 1),
    ]
    noises = [TrainingDraws(*key).normal("noise", SHAPE) for key in keys]
    assert len({noise.tobytes() for noise in noises}) == len(keys)
    assert len({TrainingDraws(*key).crop(False) for key in keys}) == len(keys)
    np.testing.assert_array_equal(TrainingDraws(*keys[0]).normal("noise", SHAPE), noises[0])
    assert noises[0].dtype == np.float32


def test_half_of_the_uses_are_flipped_and_a_share_has_an_empty_caption():
    """1000 uses, within four standard deviations of half and of a fifth."""
    draws = [TrainingDraws(0, "pair", sample, use) for sample in range(20) for use in range(50)]
    assert abs(sum(each.flip(True) for each in draws) - 500) < 64
    captions = [each.caption("a cat", Settings(0.2)) for each in draws]
    assert set(captions) == {"", "a cat"} and abs(captions.count("") - 200) < 51
    assert {each.caption("a cat", Settings(0.0)) for each in draws} == {"a cat"}
    assert {each.caption("a cat", Settings(1.0)) for each in draws} == {""}
    empty = rng.generator(0, "empty prompt", 3, 4).random() < 0.2
    assert (TrainingDraws(0, "pair", 3, 4).caption("a cat", Settings(0.2)) == "") == empty


def test_held_out_draws_are_central_unflipped_and_the_same_at_every_evaluation():
    """The noise depends on the timestep, the posteriors do not."""
    draws = HeldOutDraws(7, 3, 437)
    assert (
        draws.crop(False) is None
        and draws.flip(True) is False
        and draws.caption("b, a", Settings(1.0, shuffle_tags=True)) == "b, a"
    )
    assert draws.timestep(lambda generator: 0) == 437
    np.testing.assert_array_equal(draws.normal("noise", SHAPE), rng.normal(7, "held-out noise", 3, 437, shape=SHAPE))
    for purpose in ("posterior", "condition posterior"):
        expected = rng.normal(7, f"held-out {purpose}", 3, shape=SHAPE)
        np.testing.assert_array_equal(draws.normal(purpose, SHAPE), expected)
        np.testing.assert_array_equal(HeldOutDraws(7, 3, 62).normal(purpose, SHAPE), expected)


def test_generators_for_other_purposes():
    """Those of training by pair and use, those of held-out samples by sample alone."""
    expected = rng.generator(7, "pair fill mask", 3, 2).random(4)
    np.testing.assert_array_equal(TrainingDraws(7, "pair", 3, 2).generator("fill mask").random(4), expected)
    expected = rng.generator(7, "held-out fill mask", 3).random(4)
    for timestep in (0, 437):
        np.testing.assert_array_equal(HeldOutDraws(7, 3, timestep).generator("fill mask").random(4), expected)
