"""LoKr against NumPy: its shapes and files, the layer and its gradients, and in a model of every kind."""

import mindspore as ms
import numpy as np
import pytest
from flux_gradients import (
    assert_close,
    random_values,
)
from mindspore import nn, ops

from mindtune.models import fast_ops, int8, lokr

# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dimension, factor, expected",
    [
        (3072, -1, (48, 64)), (12288, -1, (96, 128)), (768, -1, (24, 32)), (64, -1, (8, 8)), (127, -1, (1, 127)),
        (3072, 8, (8, 384)), (3072, 384, (8, 384)), (12, 5, (3, 4)), (10, 4, (2, 5)),
        (3072, 7, (6, 512)), (7, 7, (1, 7)),
    ],
)  # fmt: skip
def test_dimensions_are_factorised_as_lycoris_does(dimension, factor, expected):
    """The values are those of LyCORIS' `factorization`."""
    assert lokr.factorise(dimension, factor) == expected


def test_the_second_factor_has_a_rank_unless_it_is_as_large():
    """At least half of its larger side, as in LyCORIS."""
    assert lokr.shapes(3072, 3072, 4) == {"lokr_w1": (48, 48), "lokr_w2_a": (64, 4), "lokr_w2_b": (4, 64)}
    assert lokr.shapes(12288, 3072, 63) == {"lokr_w1": (96, 48), "lokr_w2_a": (128, 63), "lokr_w2_b": (63, 64)}
    assert lokr.shapes(12288, 3072, 64) == {"lokr_w1": (96, 48), "lokr_w2": (128, 64)}
    assert lokr.shapes(3072, 3072, 16, factor=8) == {
        "lokr_w1": (8, 8), "lokr_w2_a": (384, 16), "lokr_w2_b": (16, 384),
    }  # fmt: skip


# ---- the layer -----------------------------------------------------------------------------------


class LokrLinear(nn.Cell):
    def __init__(self, int8_weight):
        super().__init__()
        self.function = fast_ops.lokr_int8_linear if int8_weight else fast_ops.lokr_linear

    def construct(self, x, *layer):
        return self.function(x, layer)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("int8_weight", [False, True])
@pytest.mark.parametrize("shape, dtype, tolerance", [((3, 20), np.float32, 1e-5), ((2, 5, 20), np.float16, 4e-3)])
def test_the_layer_and_its_gradients(mode, low_rank, int8_weight, shape, dtype, tolerance):
    """20 inputs, 4 x 5, and 6 outputs, 2 x 3."""
    weight, bias, w1 = random_values(6, 20), random_values(6, seed=1), random_values(2, 4, seed=2)
    base = [weight, bias]
    if int8_weight:
        codes, scale = np.empty(weight.shape, np.int8), np.empty((6, 1), np.float32)
        int8.quantise(weight, codes, scale)
        base, weight = [codes, bias, scale], codes * scale
    second = [random_values(3, 2, seed=3), random_values(2, 5, seed=4)] if low_rank else [random_values(3, 5, seed=3)]
    x, g = random_values(*shape, seed=5).astype(dtype), random_values(*shape[:-1], 6, seed=6).astype(dtype)
    tensors = [ms.Tensor(array) for array in (x, *base, w1, *second)]
    cell = LokrLinear(int8_weight)
    w2 = second[0] @ second[1] if low_rank else second[0]
    adapted = weight.astype(float) + np.kron(w1, w2)
    found = cell(*tensors)
    assert found.dtype == tensors[0].dtype
    assert_close([found.asnumpy()], [x @ adapted.T + bias], tolerance)

    gradients = ops.GradOperation(get_all=True, sens_param=True)(cell)(*tensors, ms.Tensor(g))
    dw = (g.reshape(-1, 6).astype(float).T @ x.reshape(-1, 20)).reshape(2, 3, 4, 5)  # of w1[l, m] w2[k, n]
    dw1, dw2 = np.einsum("lkmn,kn->lm", dw, w2), np.einsum("lkmn,lm->kn", dw, w1)
    expected = [(g @ adapted), dw1, *([dw2 @ second[1].T, second[0].T @ dw2] if low_rank else [dw2])]
    found = [gradients[0], *gradients[1 + len(base) :]]
    assert_close([value.asnumpy() for value in found], expected, 2 * tolerance)
