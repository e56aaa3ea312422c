"""Layers that replace mindone's own: timestep embeddings, T5's position buckets and activation, float32 attention."""

import mindspore as ms
import numpy as np
import pytest
from mindone.diffusers.models import embeddings
from test_fast_ops import values

from mindtune.models import loading, precision, replaced_layers


@pytest.mark.parametrize("channels, cosine_first, shift", [(256, True, 0), (32, False, 1)])
def test_embeddings_of_large_timesteps(mode, channels, cosine_first, shift):
    """Within the rounding of an angle of up to 1000 in float32, 6e-5."""
    original = embeddings.Timesteps(channels, cosine_first, shift)
    timesteps = np.array([0.0, 1.5, 123.4, 999.0], np.float32)
    angles = timesteps[:, None].astype(np.float64) / 10000 ** (np.arange(channels // 2) / (channels // 2 - shift))
    waves = [np.cos(angles), np.sin(angles)] if cosine_first else [np.sin(angles), np.cos(angles)]
    found = replaced_layers.Timesteps(original)(ms.Tensor(timesteps))
    assert found.dtype == ms.float32
    np.testing.assert_allclose(found.asnumpy(), np.concatenate(waves, axis=1), atol=8e-5)


def test_boundaries_of_t5s_position_buckets():
    """Per sign 8 buckets for one distance each and 8 that grow by 16^(1/8). 16, 32 and 64 each start a bucket."""
    distances = np.arange(-600, 601)
    found = replaced_layers.relative_position_bucket(ms.Tensor(distances)).asnumpy()
    for distance, bucket in zip(np.abs(distances).tolist(), found % 16):
        # In integers: the largest k with distance >= 8 * 16^(k / 8), that is distance^2 >= 2^(6 + k).
        grown = next(k for k in range(7, -1, -1) if distance**2 >= 2 ** (6 + k)) if distance >= 8 else 0
        assert bucket == (distance if distance < 8 else 8 + grown), distance
    np.testing.assert_array_equal(found >= 16, distances > 0)
    assert found.dtype == np.int64


def test_t5_uses_the_buckets_and_the_exact_activation(tiny_flux):
    t5 = loading.load_model(tiny_flux, "text_encoder_2", precision.resolve_precision("no"))
    first = t5.encoder.block[0].layer[0].SelfAttention
    bias, table = first.compute_bias(512, 512).asnumpy()[0], first.relative_attention_bias.embedding_table.asnumpy()
    for distance, bucket in ((16, 26), (32, 28), (64, 30), (-16, 10), (-32, 12), (-64, 14), (0, 0), (7, 23), (511, 31)):
        query = max(0, -distance)
        np.testing.assert_array_equal(bias[:, query, query + distance], table[bucket])
    x = values(1000, scale=4)
    expected = (
        0.5 * x.astype(np.float64) * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))
    )
    found = t5.encoder.block[0].layer[1].DenseReluDense.act(ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)  # ops.tanh has an error of 1e-4


def test_float32_attention():
    """upcast_attention of Stable Diffusion 2.1: scores beyond 65,504 are not infinite."""
    q, k, v = (values(1, 2, 5, 16, seed=n) for n in range(3))
    q, k = 400 * q, 400 * k
    scores = q.astype(np.float16).astype(np.float64) @ k.astype(np.float16).astype(np.float64).swapaxes(2, 3) / 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v.astype(np.float16).astype(np.float64)
    found = replaced_layers.float32_attention(*(ms.Tensor(x, ms.float16) for x in (q, k, v)), None)
    assert found.dtype == ms.float16
    np.testing.assert_allclose(found.asnumpy(), expected, atol=2e-3)
