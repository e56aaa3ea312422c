"""Layer functions of both backends against NumPy in float64, in both modes. See `ascend_on_cpu`."""

import mindspore as ms
import numpy as np
import pytest
from ascend_on_cpu import use_ascend_operators
from mindspore import nn, ops

from mindtune.models import fast_ops


def values(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


class Function(nn.Cell):
    """A function as a cell, which graph mode compiles."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def construct(self, *inputs):
        return self.function(*inputs)


def call(function, *arrays, dtype=ms.float32):
    return Function(function)(*(ms.Tensor(a, dtype) for a in arrays)).asnumpy()


@pytest.fixture(params=["cpu", "ascend"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "ascend":
        use_ascend_operators(monkeypatch)
    return request.param


def test_tanh_gelu_matches_the_formula_in_both_tails(mode):
    x = np.concatenate([values(500, scale=4), np.array([-40.0, -12.0, 0.0, 12.0, 40.0], np.float32)]).astype(np.float64)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(call(fast_ops.tanh_gelu, x.astype(np.float32)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, rtol", [(ms.float32, 1e-5), (ms.float16, 2e-3)])
def test_modulated_norm_of_a_large_mean(mode, dtype, rtol):
    """In the first row the mean is 400 times the deviation, so it must be subtracted before squaring."""
    x = values(2, 5, 8, scale=0.25)
    x[:, 0] += 100.0
    scale, shift = values(2, 1, 8, seed=1), values(2, 1, 8, seed=2)
    found = call(fast_ops.modulated_norm, x, scale, shift, dtype=dtype)
    x, scale, shift = (a.astype(found.dtype).astype(np.float64) for a in (x, scale, shift))
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=20 * rtol)


def test_rms_norm_of_half_precision_computes_in_float32(mode, backend):
    x, weight = values(2, 3, 5, 8, scale=300.0), 1 + 0.1 * values(8, seed=1)  # squares that overflow in fp16
    found = Function(fast_ops.rms_norm)(ms.Tensor(x, ms.float16), ms.Tensor(weight))
    dtype, rtol = (ms.float32, 1e-5) if backend == "cpu" else (ms.float16, 1e-3)
    assert found.dtype == dtype
    wide = x.astype(np.float16).astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=rtol)


def rotate(x, cos, sin):
    tables = fast_ops.rotary_table(cos, x.shape[2]), fast_ops.rotary_table(sin, x.shape[2])
    return fast_ops.rotate(x, tables)


def linear(x, *layer):
    return fast_ops.linear(x, layer)


def adapted_linear(x, *layer):
    return fast_ops.adapted_linear(x, layer)


def test_rotate_multiplies_pairs_of_channels_as_complex_numbers(mode):
    x, angles = values(2, 5, 3, 8), values(5, 1, 4, seed=1, scale=3.0)
    tables = [np.repeat(f(angles[:, 0]), 2, axis=-1) for f in (np.cos, np.sin)]
    found = call(rotate, x, *tables)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(found[..., ::2], turned.real, atol=2e-6)
    np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=2e-6)


def test_linear_with_and_without_an_adapter(mode):
    x, w, b, low, high = (
        values(2, 3, 8),
        values(5, 8, seed=1),
        values(5, seed=2),
        values(4, 8, seed=3),
        values(5, 4, seed=4),
    )
    np.testing.assert_allclose(call(linear, x, w, b), x @ w.T + b, atol=1e-5)
    found = call(adapted_linear, x, w, b, low, high)
    np.testing.assert_allclose(found, x @ w.T + b + x @ low.T @ high.T, atol=2e-5)


@pytest.mark.parametrize("shape", [(), (7,), (300, 5000), (4, 3, 3, 3)])
def test_the_sum_of_squares_of_any_shape(mode, shape):
    x = values(*shape) if shape else np.array(-3.0, np.float32)
    np.testing.assert_allclose(call(fast_ops.square_sum, x), np.square(x.astype(np.float64)).sum(), rtol=2e-6)


def test_every_sample_has_its_own_gate(mode):
    x, gate, y = values(3, 5, 4), values(3, 1, 4, seed=1), values(3, 5, 4, seed=2)
    np.testing.assert_allclose(call(fast_ops.add_gated, x, gate, y), x + gate * y, atol=1e-6)


@pytest.mark.parametrize("keys", [7, 5])
def test_attention_and_its_gradients(mode, keys):
    """Against the full Jacobian of softmax, diag(p) - p pᵀ, in float64. With as many keys as queries, and fewer."""
    q, dout = values(2, 7, 3, 4), values(2, 7, 3, 4, seed=1)
    k, v = values(2, keys, 3, 4, seed=2), values(2, keys, 3, 4, seed=3)
    q64, k64, v64, dout64 = (a.astype(np.float64) for a in (q, k, v, dout))
    p = attention_weights(q64, k64)
    jacobian = np.einsum("bhts,su->bhtsu", p, np.eye(keys)) - np.einsum("bhts,bhtu->bhtsu", p, p)
    dscores = np.einsum("bhtsu,bthd,buhd->bhts", jacobian, dout64, v64) / 2
    expected = [np.einsum("bhts,bshd->bthd", dscores, k64), np.einsum("bhts,bthd->bshd", dscores, q64)]
    expected.append(np.einsum("bhts,bthd->bshd", p, dout64))

    np.testing.assert_allclose(call(fast_ops.attention, q, k, v), np.einsum("bhts,bshd->bthd", p, v64), atol=2e-6)
    gradient = ops.GradOperation(get_all=True, sens_param=True)(Function(fast_ops.attention))
    for found, right in zip(gradient(*map(ms.Tensor, (q, k, v, dout))), expected):
        np.testing.assert_allclose(found.asnumpy(), right, atol=5e-6)


def attention_weights(q, k):
    """softmax(q k^T / sqrt(dim)) [B, heads, T, S]."""
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


@pytest.mark.parametrize("channels", [40, 64])
def test_attention_in_half_precision(mode, channels):
    """Flash attention gets a multiple of 16 channels: the 40 of Stable Diffusion 1.5 are filled up to 48."""
    q, k, v = (values(2, 5, 3, channels, seed=n).astype(np.float16) for n in range(3))
    expected = np.einsum("bhts,bshd->bthd", attention_weights(q.astype(np.float64), k.astype(np.float64)), v)
    found = call(fast_ops.attention, q, k, v, dtype=ms.float16)
    assert found.shape == q.shape
    np.testing.assert_allclose(found, expected, atol=4e-3)


def test_parts_of_tensors(mode):
    x = values(2, 7, 12)
    for part, expected in zip(Function(split_in_three)(ms.Tensor(x)), np.split(x, 3, axis=-1)):
        np.testing.assert_array_equal(part.asnumpy(), expected)
    text, image = Function(split_after_four)(ms.Tensor(x))
    np.testing.assert_array_equal(text.asnumpy(), x[:, :4])
    np.testing.assert_array_equal(image.asnumpy(), x[:, 4:])


def split_in_three(x):
    return fast_ops.split(x, 3)


def split_after_four(x):
    return fast_ops.split_tokens(x, 4)
