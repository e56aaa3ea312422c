"""DoRA against NumPy: the layer and its gradients, in a model of every kind, and its magnitudes."""

import mindspore as ms
import numpy as np
import pytest
from ascend_on_cpu import use_ascend_operators
from flux_gradients import (
    assert_close,
    random_values,
)
from mindspore import nn, ops

from mindtune.models import fast_ops, int8

INPUTS, OUTPUTS, RANK = 20, 11, 4


# ---- the layer -----------------------------------------------------------------------------------


class DoraLinear(nn.Cell):
    """`dora_linear` with int8 weights if it gets scales."""

    def construct(self, x, weight, bias, *rest):
        if len(rest) == 5:
            return fast_ops.dora_int8_linear(x, (weight, bias, *rest))
        return fast_ops.dora_linear(x, (weight, bias, *rest))


def layer(shape, dtype=np.float32, int8_weight=False):
    """(inputs of `DoraLinear`, the float64 weight)"""
    weight = random_values(OUTPUTS, INPUTS)
    weight[3] = 0.0  # a row without a direction
    base = [weight]
    if int8_weight:
        codes, scale = np.empty(weight.shape, np.int8), np.empty((OUTPUTS, 1), np.float32)
        int8.quantise(weight, codes, scale)
        base, weight = [codes, scale], codes * scale
    adapter = [
        random_values(RANK, INPUTS, seed=4, scale=0.4),
        random_values(OUTPUTS, RANK, seed=5, scale=0.4),
        np.abs(random_values(OUTPUTS, seed=6)) + 0.5,
        np.square(weight).sum(1),
    ]
    arrays = [random_values(*shape, seed=1).astype(dtype), base[0], random_values(OUTPUTS, seed=2), *base[1:], *adapter]
    return arrays, weight.astype(np.float64)


def expected_output(x, weight, bias, a, b, magnitude):
    adapted = weight + b @ a
    return x @ (magnitude[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)).T + bias


@pytest.mark.parametrize("backend", ["cpu", "ascend"])
@pytest.mark.parametrize("int8_weight", [False, True])
@pytest.mark.parametrize(
    "shape, dtype, tolerance", [((3, INPUTS), np.float32, 1e-5), ((2, 5, INPUTS), np.float16, 4e-3)]
)
def test_the_layer_and_its_gradients(mode, monkeypatch, backend, int8_weight, shape, dtype, tolerance):
    """The norms are constants in the gradients of x, A and B (section 4.3 of the paper)."""
    if backend == "ascend":
        use_ascend_operators(monkeypatch)
    arrays, weight = layer(shape, dtype, int8_weight)
    x, bias, (a, b, m, _) = arrays[0].astype(float), arrays[2], (v.astype(float) for v in arrays[-4:])
    tensors = [ms.Tensor(array) for array in arrays]
    found = DoraLinear()(*tensors)
    assert found.dtype == tensors[0].dtype
    assert_close([found.asnumpy()], [expected_output(x, weight, bias, a, b, m)], tolerance)

    g = random_values(*shape[:-1], OUTPUTS, seed=3).astype(dtype)
    gradients = ops.GradOperation(get_all=True, sens_param=True)(DoraLinear())(*tensors, ms.Tensor(g))
    found = [gradients[0], *gradients[-4:-1]]
    norms = np.linalg.norm(weight + b @ a, axis=1)
    x, g = x.reshape(-1, INPUTS), g.reshape(-1, OUTPUTS).astype(float)
    scaled = g * m / norms
    expected = [
        (scaled @ (weight + b @ a)).reshape(shape),
        (scaled @ b).T @ x,
        scaled.T @ (x @ a.T),
        (g * (x @ (weight + b @ a).T)).sum(0) / norms,
    ]
    assert_close([value.asnumpy() for value in found], expected, 2 * tolerance)


def test_small_changes_of_a_magnitude_survive_half_precision(mode):
    """A change by 0.04 % is less than half a step of float16 at 1, so 1.0004 would be rounded to 1."""
    arrays, weight = layer((300, INPUTS), np.float16)
    arrays[2][:] = arrays[4][:] = 0
    outputs = []
    for factor in (1.0, 1.0004):
        arrays[5] = (factor * np.linalg.norm(weight, axis=1)).astype(np.float32)
        outputs.append(DoraLinear()(*map(ms.Tensor, arrays)).asnumpy().astype(float))
    before, after = outputs
    assert (before * (after - before)).sum() / np.square(before).sum() == pytest.approx(4e-4, rel=0.1)
