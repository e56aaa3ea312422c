"""LoKr against NumPy: its shapes and files, the layer and its gradients, and in a model of every kind."""

import mindspore as ms
import numpy as np
import pytest
from flux_gradients import (
    FLOAT16,
    FLOAT32,
    TARGETS,
    assert_close,
    loss_and_gradients,
    loss_of,
    random_values,
    recompute,
)
from mindspore import nn, ops

from mindtune.models import fast_ops, int8, loading, lokr, lora, precision

# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dimension, factor, expected",
    [
        (3072, -1, (48, 64)), (12288, -1, (96, 128)), (768, -1, (24, 32)), (64, -1, (8, 8)), (127, -1, (1, 127)),
        (3072, 8, (8, 384)), (3072, 384, (8, 384)), (12, 5, (3, 4)), (10, 4, (2, 5)), (3072, 7, (6, 512)), (7, 7, (1, 7))
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


# ---- in a model ----------------------------------------------------------------------------------


def add_lokr(model, rank=4, factor=-1, trained=True):
    """Adds a LoKr to every type of layer, with values as after training; everything else is frozen."""
    precision.freeze_params(model)
    lora.add_lokr(model, rank, 6.0, factor, [*TARGETS, "proj_out", "linear_1", "norm_out.linear"])
    lora.init_lora(model, rank, seed=0)
    for number, parameter in enumerate(lora.lora_parameters(model).values() if trained else ()):
        parameter.set_data(ms.Tensor(random_values(*parameter.shape, seed=number, scale=0.3)))
    return model


def merged(model, adapted):
    """`model` with the weights that the LoKr of `adapted` stands for, computed by NumPy."""
    parameters = {name: p.asnumpy().astype(float) for name, p in lora.lora_parameters(adapted).items()}
    cells = dict(model.cells_and_names())
    for name in [name for name in parameters if name.endswith(".lokr_w1")]:
        layer, scale = name.rpartition(".")[0], 1.0
        w2 = parameters.get(f"{layer}.lokr_w2")
        if w2 is None:
            first, second = parameters[f"{layer}.lokr_w2_a"], parameters[f"{layer}.lokr_w2_b"]
            w2, scale = first @ second, 6.0 / len(second)
        weight = cells[layer].weight
        weight.set_data(ms.Tensor(weight.asnumpy() + scale * np.kron(parameters[name], w2), ms.float32))
    return model


@pytest.fixture
def load(tiny_flux):
    return lambda dtypes=FLOAT32: loading.load_model(tiny_flux, "transformer", dtypes)


@pytest.fixture(scope="module")
def expected(tiny_flux):
    """Loss and gradients of a LoKr in PyNative, and the loss of the merged model."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    adapted = add_lokr(loading.load_model(tiny_flux, "transformer", FLOAT32))
    ends = {name.rpartition(".")[2] for name in lora.lora_parameters(adapted)}
    assert ends == {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}  # some layers have each form
    found = loss_and_gradients(adapted)
    loss = loss_of(merged(loading.load_model(tiny_flux, "transformer", FLOAT32), adapted))
    ms.set_context(mode=before)
    return found, loss


def test_it_computes_what_the_merged_weights_compute(expected):
    (loss, *gradients), of_merged = expected
    assert loss == pytest.approx(of_merged, rel=1e-5)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)


@pytest.mark.slow
def test_graph_mode_and_recomputation_change_nothing(load, expected, mode):
    assert_close(loss_and_gradients(recompute(add_lokr(load()))), expected[0], 2e-5)


def test_a_new_lokr_has_no_effect_and_a_disabled_one_neither(load):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    base = loss_of(load())
    model = add_lokr(load(), trained=False)
    assert loss_of(model) == base
    for name, parameter in lora.lora_parameters(model).items():
        assert np.any(parameter.asnumpy()) == name.endswith(("w1", "w2_a")), name
    model = add_lokr(load())
    adapted = loss_of(model)
    lora.enable_lora(model, False)
    assert loss_of(model) == base
    lora.enable_lora(model, True)
    assert loss_of(model) == adapted != base


def test_weights_keep_their_names_and_only_the_factors_train_in_float32(load):
    names = {name for name, _ in load().parameters_and_names()}
    model = add_lokr(load(FLOAT16))
    trained = lora.lora_parameters(model)
    assert {name for name, _ in model.parameters_and_names()} == names | set(trained)
    assert {p.name for p in model.trainable_params()} == set(trained)
    assert {p.dtype for p in model.trainable_params()} == {ms.float32}
