"""Layer functions against NumPy in float64, in both modes, also with other devices' operators that the CPU has."""

import mindspore as ms
import numpy as np
import pytest
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


@pytest.fixture(params=[True, False], ids=["cpu", "other"])
def device(request, monkeypatch):
    monkeypatch.setattr(fast_ops, "ON_CPU", request.param)


def test_tanh_gelu_matches_the_formula_in_both_tails(mode):
    x = np.concatenate([values(500, scale=4), np.array([-40.0, -12.0, 0.0, 12.0, 40.0], np.float32)]).astype(np.float64)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(call(fast_ops.tanh_gelu, x.astype(np.float32)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, rtol", [(ms.float32, 1e-5), (ms.float16, 2e-3)])
def test_modulated_norm_of_a_large_mean(mode, device, dtype, rtol):
    """In the first row the mean is 400 times the deviation, so it must be subtracted before squaring."""
    x = values(2, 5, 8, scale=0.25)
    x[:, 0] += 100.0
    scale, shift = values(2, 1, 8, seed=1), values(2, 1, 8, seed=2)
    found = call(fast_ops.modulated_norm, x, scale, shift, dtype=dtype)
    x, scale, shift = (a.astype(found.dtype).astype(np.float64) for a in (x, scale, shift))
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=20 * rtol)


def test_rms_norm_of_half_precision_computes_in_float32(mode):
    x, weight = values(2, 3, 5, 8, scale=300.0), 1 + 0.1 * values(8, seed=1)  # squares that overflow in fp16
    found = Function(fast_ops.rms_norm)(ms.Tensor(x, ms.float16), ms.Tensor(weight))
    assert found.dtype == ms.float32
    wide = x.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(
        found.asnumpy(), wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6) * weight, rtol=1e-5
    )


def rotate(x, cos, sin):
    return fast_ops.rotate(x, (cos, sin))


def linear(x, *layer):
    return fast_ops.linear(x, layer)


def adapted_linear(x, *layer):
    return fast_ops.adapted_linear(x, layer)


def test_rotate_multiplies_pairs_of_channels_as_complex_numbers(mode):
    x, angles = values(2, 5, 3, 8), values(5, 1, 4, seed=1, scale=3.0)
    tables = [np.tile(np.repeat(f(angles), 2, axis=-1), (1, 3, 1)) for f in (np.cos, np.sin)]
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
def test_the_sum_of_squares_of_any_shape(mode, device, shape):
    x = values(*shape) if shape else np.array(-3.0, np.float32)
    np.testing.assert_allclose(call(fast_ops.square_sum, x), np.square(x.astype(np.float64)).sum(), rtol=2e-6)


def test_every_sample_has_its_own_gate(mode, device):
    x, gate, y = values(3, 5, 4), values(3, 1, 4, seed=1), values(3, 5, 4, seed=2)
    np.testing.assert_allclose(call(fast_ops.add_gated, x, gate, y), x + gate * y, atol=1e-6)


@pytest.mark.parametrize("keys", [7, 5])
def test_attention_and_its_gradients(mode, keys):
    """Against the full Jacobian of softmax, diag(p) - p pᵀ, in float64. With as many keys as queries, and fewer."""
    q, dout = values(2, 3, 7, 4), values(2, 3, 7, 4, seed=1)
    k, v = values(2, 3, keys, 4, seed=2), values(2, 3, keys, 4, seed=3)
    q64, k64, v64, dout64 = (a.astype(np.float64) for a in (q, k, v, dout))
    scores = np.einsum("bhtd,bhsd->bhts", q64, k64) / 2
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    jacobian = np.einsum("bhts,su->bhtsu", p, np.eye(keys)) - np.einsum("bhts,bhtu->bhtsu", p, p)
    dscores = np.einsum("bhtsu,bhtd,bhud->bhts", jacobian, dout64, v64) / 2
    expected = [np.einsum("bhts,bhsd->bhtd", dscores, k64), np.einsum("bhts,bhtd->bhsd", dscores, q64)]
    expected.append(np.einsum("bhts,bhtd->bhsd", p, dout64))

    np.testing.assert_allclose(call(fast_ops.attention, q, k, v), np.einsum("bhts,bhsd->bhtd", p, v64), atol=2e-6)
    gradient = ops.GradOperation(get_all=True, sens_param=True)(Function(fast_ops.attention))
    for found, right in zip(gradient(*map(ms.Tensor, (q, k, v, dout))), expected):
        np.testing.assert_allclose(found.asnumpy(), right, atol=5e-6)
