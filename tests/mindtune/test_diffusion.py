"""Noise schedule, targets and Min-SNR weights, against closed forms and mindone's schedulers."""

import math

import mindspore as ms
import numpy as np
import pytest

from mindtune import diffusion
from mindtune.cli import UserError

SD15 = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_match_mindone(schedule):
    from mindone.diffusers import DDPMScheduler

    config = {**SD15, "beta_schedule": schedule}
    expected = DDPMScheduler(**config).alphas_cumprod.asnumpy()
    np.testing.assert_allclose(diffusion.alphas_cumprod(config), expected, rtol=2e-4, atol=1e-9)


def test_the_scaled_linear_schedule_by_hand():
    found = diffusion.alphas_cumprod({**SD15, "num_train_timesteps": 3})
    roots = [math.sqrt(0.00085), (math.sqrt(0.00085) + math.sqrt(0.012)) / 2, math.sqrt(0.012)]
    np.testing.assert_allclose(found, np.cumprod([1 - root**2 for root in roots]), rtol=1e-12)


@pytest.mark.parametrize(
    "change", [{"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.1]}]
)
def test_an_unknown_schedule_is_rejected(change):
    with pytest.raises(UserError, match="not supported"):
        diffusion.alphas_cumprod({**SD15, **change})


def test_min_snr_weights():
    alphas = np.array([0.99, 0.9, 0.5, 0.1])  # SNR 99, 9, 1, 1/9
    np.testing.assert_allclose(diffusion.min_snr_weights(alphas, 5.0, "epsilon"), [5 / 99, 5 / 9, 1, 1])
    np.testing.assert_allclose(
        diffusion.min_snr_weights(alphas, 5.0, "v_prediction"), [5 / 100, 5 / 10, 1 / 2, (1 / 9) / (1 / 9 + 1)]
    )
    np.testing.assert_array_equal(diffusion.min_snr_weights(alphas, None, "epsilon"), np.ones(4))


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_noise_and_velocity(mode):
    """With a = cos^2: noisy = cos x + sin n, v = cos n - sin x; so x = cos noisy - sin v and n = sin noisy + cos v."""
    ms.set_context(mode=mode)
    rng = np.random.default_rng(0)
    x, n = rng.standard_normal((2, 3, 4, 5, 7)).astype(np.float32)
    angle = np.array([0.3, 1.1, 1.5], np.float32).reshape(3, 1, 1, 1)
    alphas = ms.Tensor(np.cos(angle) ** 2)
    noisy = diffusion.add_noise(ms.Tensor(x), ms.Tensor(n), alphas).asnumpy()
    velocity = diffusion.target(ms.Tensor(x), ms.Tensor(n), alphas, "v_prediction").asnumpy()
    np.testing.assert_allclose(np.cos(angle) * noisy - np.sin(angle) * velocity, x, atol=1e-5)
    np.testing.assert_allclose(np.sin(angle) * noisy + np.cos(angle) * velocity, n, atol=1e-5)
    np.testing.assert_array_equal(diffusion.target(ms.Tensor(x), ms.Tensor(n), alphas, "epsilon").asnumpy(), n)
