"""The Euler loop against NumPy with fake transformers, with sources and conditions, and what the VAE does for it."""

import math

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from mindtune import rng
from mindtune.models import sampling
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


# ---- sources and conditions ----------------------------------------------------------------------


class MixingTransformer:
    """A velocity that depends on all tokens: half of a token's first C values, the mean of all, and its ids.

    Of further values it adds a quarter of the next C, and the mean of the rest.
    """

    def __init__(self, channels):
        self.config, self.channels = {"guidance_embeds": True}, channels

    def __call__(self, hidden_states, img_ids, **_):
        hidden, count = hidden_states.to(ms.float32), 4 * self.channels
        velocity = 0.5 * hidden[:, :, :count] + 2.0 * hidden.mean(axis=(1, 2)).reshape((-1, 1, 1))
        velocity = velocity + (img_ids[:, 0] + 0.1 * img_ids[:, 1] - 0.2 * img_ids[:, 2]).reshape((1, -1, 1))
        if hidden.shape[2] > count:
            velocity = velocity + 0.25 * hidden[:, :, count : 2 * count]
        if hidden.shape[2] > 2 * count:
            velocity = velocity + hidden[:, :, 2 * count :].mean(axis=2, keep_dims=True)
        return (velocity.to(hidden_states.dtype),)


def euler(noise, sigmas, velocity):
    x = noise.astype(np.float64)
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0]):
        x = x + (following - sigma) * velocity(x)
    return x


def shifted(shape, steps):
    return reference(FIXED, np.zeros((shape[0], 1, 1)), np.zeros((shape[0], 1)), np.zeros(shape), steps, 0)[1][:-1]


@pytest.mark.parametrize("source_shape", [(2, 4, 8, 2), (2, 4, 4, 6)], ids=["own size", "same size"])
def test_a_source_is_further_tokens_whose_prediction_is_not_used(source_shape):
    """Without its noise, which never changes; the shift is that of the image alone, even if it depends on the size."""
    embeds, pooled, noise = inputs((2, 4, 4, 6))
    source = np.random.default_rng(1).standard_normal(source_shape).astype(np.float32)
    found = sample_latents(MixingTransformer(4), FIXED, embeds, pooled, noise, 3, 1.0, ms.float32, source=source)
    rows, columns = np.mgrid[0:4, 0:6] // 2

    def velocity(x):
        mean = np.concatenate([x.reshape(2, -1), source.reshape(2, -1)], axis=1).mean(axis=1).reshape(2, 1, 1, 1)
        return 0.5 * x + 2.0 * mean + 0.1 * rows - 0.2 * columns

    np.testing.assert_allclose(found, euler(noise, shifted(noise.shape, 3), velocity), rtol=1e-5, atol=1e-5)


def test_the_shift_does_not_depend_on_a_source():
    embeds, pooled, noise = inputs((1, 4, 16, 16))
    calls = []
    for source in (None, noise):
        transformer = FakeTransformer()
        sample_latents(transformer, DYNAMIC, embeds, pooled, noise, 2, 1.0, ms.float32, source=source)
        calls.append([float(call[3][0]) for call in transformer.calls])
    assert calls[0] == calls[1]


@pytest.mark.parametrize("with_mask", [False, True])
def test_conditions_are_read_beside_the_latents(with_mask):
    embeds, pooled, noise = inputs((2, 4, 4, 6))
    random = np.random.default_rng(1)
    condition = [
        random.standard_normal((2, count, 4, 6)).astype(np.float32) for count in ([4, 9] if with_mask else [4])
    ]
    found = sample_latents(
        MixingTransformer(4), FIXED, embeds, pooled, noise, 3, 1.0, ms.float32, condition=tuple(condition)
    )
    rows, columns = np.mgrid[0:4, 0:6] // 2

    def velocity(x):
        whole = np.concatenate([x, *condition], axis=1)
        made = 0.5 * x + 2.0 * whole.mean(axis=(1, 2, 3), keepdims=True) + 0.1 * rows - 0.2 * columns
        if with_mask:  # the mean over a token's 2 x 2 latents
            means = condition[1].mean(axis=1, keepdims=True).reshape(2, 1, 2, 2, 3, 2).mean(axis=(3, 5))
            made = made + means.repeat(2, axis=2).repeat(2, axis=3)
        return made + 0.25 * condition[0]

    np.testing.assert_allclose(found, euler(noise, shifted(noise.shape, 3), velocity), rtol=1e-5, atol=1e-5)


class EncodingVae(FakeVae):
    """Its mean is every eighth pixel, its log-variance is large."""

    def __init__(self):
        super().__init__()
        self.config.update(latent_channels=3, block_out_channels=[1, 1, 1, 1])

    def encode(self, pixels):
        self.pixels = pixels.asnumpy()
        mean = pixels[:, :, ::8, ::8]
        return (ms.ops.cat([mean, mean + 9.0], 1),)


def test_the_condition_of_a_control_lora_is_the_mean_of_its_latents():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    (latents,) = sampling.encode_condition(EncodingVae(), image, None, ms.float32)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    np.testing.assert_allclose(latents, (pixels[:, :, ::8, ::8] - 0.25) * 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(latents, sampling.encode_image(EncodingVae(), image, ms.float32))


def test_the_condition_of_a_fill_model_is_the_masked_image_and_the_pixels_of_the_mask():
    """White from 128 on; masked pixels are 0, which is gray, as in FluxFillPipeline."""
    random, vae = np.random.default_rng(0), EncodingVae()
    image = Image.fromarray(random.integers(0, 256, (16, 32, 3), dtype=np.uint8))
    gray = random.integers(0, 256, (16, 32), dtype=np.uint8)
    gray[0, :2] = 127, 128
    latents, mask = sampling.encode_condition(vae, image, Image.fromarray(gray), ms.float32)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    np.testing.assert_allclose(vae.pixels, np.where(gray >= 128, 0.0, pixels), atol=1e-6)
    assert latents.shape == (1, 3, 2, 4) and mask.shape == (1, 64, 2, 4) and mask.dtype == np.float32
    for y, x in np.ndindex(16, 32):
        assert mask[0, y % 8 * 8 + x % 8, y // 8, x // 8] == (gray[y, x] >= 128)


def test_an_image_of_a_prompt_from_its_seed_and_number():
    """Drawn from the noise of validation, and decoded."""
    embeds, pooled, _ = inputs((1, 3, 2, 4))
    text, vae = {"prompt_embeds": embeds[0], "pooled_prompt_embeds": pooled[0]}, EncodingVae()
    given = {"size": (16, 32), "seed": 5, "number": 2, "steps": 2, "guidance": 1.5}
    found = sampling.flux_image(FakeTransformer(), vae, DYNAMIC, text, ms.float32, **given)
    noise = rng.normal(5, "validation", 2, shape=(1, 3, 2, 4))
    latents = sample_latents(FakeTransformer(), DYNAMIC, embeds, pooled, noise, 2, 1.5, ms.float32)
    (expected,) = decode_latents(vae, latents, ms.float32)
    assert np.array_equal(np.asarray(found), np.asarray(expected)) and found.size == (4, 2)
