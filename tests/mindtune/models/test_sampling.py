"""The Euler loop against NumPy with a fake transformer, decoding, and grids of images."""

import math

import mindspore as ms
import numpy as np
import pytest

from mindtune.models.sampling import decode_latents, sample_latents

DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
}
FIXED = {"use_dynamic_shifting": False, "shift": 3.0}


class FakeTransformer:
    """A velocity that depends on every input: tokens, their ids, time, guidance, text and pooled text."""

    def __init__(self, guidance_embeds=True):
        self.config, self.calls = {"guidance_embeds": guidance_embeds}, []

    def __call__(
        self,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        img_ids,
        txt_ids,
        guidance,
        return_dict,
    ):
        assert (
            return_dict is False
            and txt_ids.shape == (encoder_hidden_states.shape[1], 3)
            and not txt_ids.asnumpy().any()
        )
        assert (guidance is None) != self.config["guidance_embeds"]
        self.calls.append(
            (hidden_states.dtype, encoder_hidden_states.dtype, pooled_projections.dtype, timestep.asnumpy().copy())
        )
        time = timestep if guidance is None else timestep + 0.01 * guidance
        text = encoder_hidden_states.to(ms.float32).mean(axis=(1, 2)) - 0.5 * pooled_projections.to(ms.float32).mean(
            axis=1
        )
        place = img_ids[:, 1] + 0.1 * img_ids[:, 2]
        channel = ms.Tensor(np.arange(hidden_states.shape[2]) // 4, ms.float32)
        velocity = (
            0.5 * hidden_states.to(ms.float32)
            + (time + text).reshape((-1, 1, 1))
            + place.reshape((1, -1, 1)) * 0.01 * channel
        )
        return (velocity.to(hidden_states.dtype),)


def reference(scheduler, embeds, pooled, noise, steps, guidance, guided=True):
    """The Euler loop on [B, C, H, W] in NumPy: latents are not packed, and sigmas come from a closed form."""
    b, c, h, w = noise.shape
    mu = 0.5 + (1.15 - 0.5) * (h * w / 4 - 256) / (4096 - 256)
    shift = math.exp(mu) if scheduler["use_dynamic_shifting"] else 3.0
    x = noise.astype(np.float64)
    text = embeds.mean(axis=(1, 2)) - 0.5 * pooled.mean(axis=1)
    rows, columns = np.mgrid[0:h, 0:w] // 2
    place = 0.01 * (rows + 0.1 * columns)[None, None] * np.arange(c).reshape(1, c, 1, 1)
    sigmas = [1 - k / steps for k in range(steps)]  # 1 to 1/steps
    sigmas = [1 / (1 + (1 / s - 1) / shift) for s in sigmas] + [0.0]
    for k in range(steps):
        time = sigmas[k] + (0.01 * guidance if guided else 0.0)
        x = x + (sigmas[k + 1] - sigmas[k]) * (0.5 * x + (time + text).reshape(b, 1, 1, 1) + place)
    return x, sigmas


def inputs(shape=(3, 4, 6, 10)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(np.float32) for s in ((shape[0], 5, 8), (shape[0], 7), shape)]


@pytest.mark.parametrize("scheduler", [DYNAMIC, FIXED], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("shape, steps", [((3, 4, 6, 10), 4), ((1, 16, 8, 2), 1), ((2, 2, 4, 4), 7)])
def test_the_euler_loop(scheduler, shape, steps):
    embeds, pooled, noise = inputs(shape)
    transformer = FakeTransformer()
    found = sample_latents(transformer, scheduler, embeds, pooled, noise, steps, 3.5, ms.float32)
    expected, sigmas = reference(scheduler, embeds, pooled, noise, steps, 3.5)
    assert found.shape == shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for call, sigma in zip(transformer.calls, sigmas):
        np.testing.assert_allclose(call[3], [sigma] * shape[0], rtol=1e-6)
    assert len(transformer.calls) == steps


def test_a_transformer_without_guidance():
    embeds, pooled, noise = inputs()
    found = sample_latents(FakeTransformer(False), DYNAMIC, embeds, pooled, noise, 3, 3.5, ms.float32)
    np.testing.assert_allclose(
        found, reference(DYNAMIC, embeds, pooled, noise, 3, 3.5, guided=False)[0], rtol=1e-5, atol=1e-5
    )


def test_images_of_a_batch_are_independent():
    embeds, pooled, noise = inputs()
    together = sample_latents(FakeTransformer(), DYNAMIC, embeds, pooled, noise, 3, 3.5, ms.float32)
    for n in range(3):
        alone = sample_latents(
            FakeTransformer(), DYNAMIC, embeds[n : n + 1], pooled[n : n + 1], noise[n : n + 1], 3, 3.5, ms.float32
        )
        np.testing.assert_allclose(together[n], alone[0], rtol=1e-6)


@pytest.mark.parametrize("compute, tolerance", [(ms.float16, 5e-3), (ms.bfloat16, 5e-2)])
def test_only_the_transformer_uses_half_precision(compute, tolerance):
    """Its inputs are in half precision; latents are accumulated in float32."""
    embeds, pooled, noise = inputs()
    transformer = FakeTransformer()
    found = sample_latents(transformer, DYNAMIC, embeds, pooled, noise, 4, 3.5, compute)
    assert all(call[:3] == (compute,) * 3 for call in transformer.calls) and found.dtype == np.float32
    np.testing.assert_allclose(found, reference(DYNAMIC, embeds, pooled, noise, 4, 3.5)[0], atol=tolerance)
    assert (found != found.astype(np.float16)).any()


# ---- decoding ------------------------------------------------------------------------------------


class FakeVae:
    """Its first three latent channels are the image."""

    def __init__(self):
        self.config = {"scaling_factor": 0.5, "shift_factor": 0.25}

    def decode(self, z, return_dict):
        assert return_dict is False
        return (z[:, :3],)


@pytest.mark.parametrize("compute", [ms.float32, ms.float16])
def test_latents_are_unscaled_decoded_and_clipped(compute):
    """z / scaling + shift; -1 is black, 0 is 128, 1 is white, other values are clipped, and NaN is black."""
    pixels = np.array([-1.0, 0.0, 1.0, 2.0, -3.0, np.nan, 0.5, 1 / 255])
    latents = np.zeros((2, 4, 2, 4), np.float32)
    latents[:, :3] = (pixels.reshape(2, 4) - 0.25) * 0.5
    images = decode_latents(FakeVae(), latents, compute)
    assert [image.size for image in images] == [(4, 2)] * 2
    assert np.asarray(images[1])[:, :, 0].tolist() == [[0, 128, 255, 255], [0, 0, 191, 128]]


# ---- grids ---------------------------------------------------------------------------------------


# ---- conditions ----------------------------------------------------------------------------------
