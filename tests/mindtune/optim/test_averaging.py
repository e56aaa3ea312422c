"""The moving average of the weights against its formula."""

import mindspore as ms
import numpy as np

from mindtune.optim.averaging import EMA


def test_the_moving_average_follows_its_formula_and_replaces_the_weights_in_its_context(mode):
    """Early decays are (1 + t) / (10 + t), later ones the given decay; after `averaged` the weights are as before."""
    live = [
        ms.Parameter(ms.Tensor(np.arange(3, dtype=np.float32)), name="a"),
        ms.Parameter(ms.Tensor(np.ones((2, 2), np.float32)), name="b"),
    ]
    ema = EMA(live, 0.3)
    expected = [p.asnumpy().astype(np.float64) for p in live]
    draw = np.random.default_rng(0)
    for step in range(1, 6):
        for number, parameter in enumerate(live):
            parameter.set_data(ms.Tensor(draw.standard_normal(parameter.shape).astype(np.float32)))
            decay = min(0.3, (1 + step) / (10 + step))
            expected[number] = decay * expected[number] + (1 - decay) * parameter.asnumpy()
        ema.update(step)
    last = [p.asnumpy().copy() for p in live]
    with ema.averaged():
        for parameter, value in zip(live, expected):
            np.testing.assert_allclose(parameter.asnumpy(), value, rtol=1e-5, atol=1e-7)
    for parameter, value in zip(live, last):
        np.testing.assert_array_equal(parameter.asnumpy(), value)


def test_updating_every_tenth_update_gives_the_same_average(mode):
    live = [ms.Parameter(ms.Tensor(np.zeros(2, np.float32)), name="a")]
    each, tenth = EMA(live, 0.9), EMA(live, 0.9)
    live[0].set_data(ms.Tensor(np.ones(2, np.float32)))
    for step in range(1001, 1011):
        each.update(step)
    tenth.update(1010, every=10)
    np.testing.assert_allclose(tenth.averages[0].asnumpy(), each.averages[0].asnumpy(), rtol=1e-5)
