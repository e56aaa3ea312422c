"""Storage and compute dtypes, trainable parameters, loss scaling, and gradient clipping."""

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from mindspore import nn, ops

from mindtune.models.precision import (
    GradNormClipper,
    Precision,
    cast_cell,
    cast_training_params,
    freeze_params,
    loss_scaler,
    parameter_table,
    resolve_precision,
)

FLOATS = {"no": ms.float32, "fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


class Net(nn.Cell):
    """Two linear layers, a norm, and integers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Dense(5, 4), nn.LayerNorm((4,)), nn.Dense(4, 3, has_bias=False)
        self.table = ms.Parameter(ms.Tensor([1, 2, 300_000], ms.int32), requires_grad=False)

    def construct(self, x):
        return self.second(self.norm(self.first(x)))


class Sinusoid(nn.Cell):
    """Computes in float32 on purpose, as FLUX does for its timestep, and has a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = ms.Parameter(ms.Tensor([1.0], ms.float32))

    def construct(self, t):
        return ops.sin(t.to(ms.float32) * 1000.3).to(self.scale.dtype)


class Clip(nn.Cell):
    def __init__(self, clipper):
        super().__init__()
        self.clipper = clipper

    def construct(self, *grads):
        return self.clipper.clip_grad_norm(grads)


# ---- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, storage, compute",
    [("no", "no", "no"), ("fp32", "no", "no"), ("fp16", "fp16", "fp16"), ("bf16", "bf16", "no")],
)
def test_precisions_on_the_cpu(name, storage, compute):
    """MindSpore has no bf16 matrix product on the CPU: bf16 is stored in bf16 and computed in fp32."""
    assert resolve_precision(name) == Precision(FLOATS[storage], FLOATS[compute])


def test_bf16_on_other_devices(monkeypatch):
    monkeypatch.setattr(ms, "get_context", lambda name: "Ascend")
    assert resolve_precision("bf16") == Precision(ms.bfloat16, ms.bfloat16)


@pytest.mark.parametrize("name", ["no", "fp16", "bf16"])
def test_cast_cell_casts_floats_only(name):
    cell = cast_cell(Net(), resolve_precision(name))
    types = {p.name: p.dtype for p in cell.get_parameters()}
    assert types.pop("table") == ms.int32 and set(types.values()) == {FLOATS[name]}
    assert cell.table.asnumpy().tolist() == [1, 2, 300_000]


@pytest.mark.parametrize("name, numpy_type", [("no", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_cast_cell_rounds_weights_to_the_nearest(name, numpy_type):
    cell = nn.Dense(50, 40)
    before = cell.weight.asnumpy().copy()
    cast_cell(cell, resolve_precision(name))
    np.testing.assert_array_equal(cell.weight.to(ms.float32).asnumpy(), before.astype(numpy_type).astype(np.float32))


@pytest.mark.parametrize("input_type", [ms.float32, ms.bfloat16])
def test_a_bf16_stored_layer_computes_in_fp32(mode, input_type):
    """Against float64 with the rounded weights: an error of 1e-6, where products in bf16 have 1e-2."""
    cell = cast_cell(nn.Dense(64, 3), resolve_precision("bf16"))
    weight, bias = (p.to(ms.float32).asnumpy().astype(np.float64) for p in (cell.weight, cell.bias))
    x = ms.Tensor(np.random.default_rng(0).standard_normal((2, 64)), ms.float32).to(input_type)
    found = cell(x)
    assert found.dtype == ms.float32
    np.testing.assert_allclose(
        found.asnumpy(), x.to(ms.float32).asnumpy().astype(np.float64) @ weight.T + bias, rtol=1e-5, atol=2e-6
    )


def test_a_whole_bf16_stored_model_computes_in_fp32(mode):
    cell = cast_cell(Net(), resolve_precision("bf16"))
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    w = {p.name: p.to(ms.float32).asnumpy().astype(np.float64) for p in cell.get_parameters()}
    hidden = x @ w["first.weight"].T + w["first.bias"]
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + cell.norm.epsilon)
    expected = (hidden * w["norm.gamma"] + w["norm.beta"]) @ w["second.weight"].T
    np.testing.assert_allclose(cell(ms.Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_fp16_layer_computes_in_fp16(mode):
    assert (
        cast_cell(nn.Dense(5, 3), resolve_precision("fp16"))(ms.Tensor(np.ones((2, 5)), ms.float16)).dtype == ms.float16
    )


@pytest.mark.parametrize("name, tolerance", [("fp16", 1e-3), ("bf16", 1e-3)])
def test_float32_computations_are_not_narrowed(mode, name, tolerance):
    """In fp16 the sine of 1000 t would be off by tenths."""
    precision = resolve_precision(name)
    t = ms.Tensor([0.0123, 0.4567, 0.987], precision.compute)
    expected = np.sin(t.to(ms.float32).asnumpy().astype(np.float64) * 1000.3)
    found = cast_cell(Sinusoid(), Precision(precision.compute, precision.compute))(t)
    np.testing.assert_allclose(found.to(ms.float32).asnumpy(), expected, atol=tolerance)


# ---- trainable parameters ---------------------------------------------------------------------------------


def test_freeze_params():
    cell = Net()
    assert len(cell.trainable_params()) == 5
    freeze_params(cell)
    assert cell.trainable_params() == []


def test_cast_training_params():
    cells = [cast_cell(Net(), resolve_precision("fp16")) for _ in range(2)]
    for cell in cells:
        freeze_params(cell)
        cell.second.weight.requires_grad = True
    cast_training_params(cells)
    for cell in cells:
        assert {p.name: p.dtype for p in cell.get_parameters() if p.dtype != ms.float16} == {
            "second.weight": ms.float32,
            "table": ms.int32,
        }


def test_the_parameter_table():
    """Net: 5*4+4 and 4+4 and 4*3 floats, 3 integers; Dense: 200*10."""
    net, frozen = Net(), cast_cell(nn.Dense(200, 10, has_bias=False), resolve_precision("bf16"))
    freeze_params(frozen)
    freeze_params(net)
    net.second.weight.requires_grad = True
    models = {"net": net, "frozen": frozen, "vae": None}
    *lines, note = parameter_table(models, resolve_precision("bf16")).splitlines()
    assert note.startswith("bf16 on the CPU: weights are stored in bf16 and computed in fp32")
    rows = [line.split("  ") for line in lines]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["module", "stored", "computed", "parameters", "trainable"],
        ["net", "float32+int32", "float32", "35", "0"],
        ["net (trained)", "float32", "float32", "12", "12"],
        ["frozen", "bfloat16", "float32", "2,000", "0"],
    ]


# ---- the loss scale ------------------------------------------------------------------------------


def test_the_fp16_scale_halves_on_overflow_and_doubles_after_2000_good_updates():
    scaler = loss_scaler("fp16")
    assert float(scaler.scale_value) == 65536
    scaler.adjust(ms.Tensor(False))
    assert float(scaler.scale_value) == 32768
    scaler.counter.set_data(ms.Tensor(1998, scaler.counter.dtype))
    scaler.adjust(ms.Tensor(True))
    assert float(scaler.scale_value) == 32768
    scaler.adjust(ms.Tensor(True))
    assert float(scaler.scale_value) == 65536


@pytest.mark.parametrize("name", ["no", "bf16"])
def test_other_precisions_have_no_scale(name):
    scaler = loss_scaler(name)
    scaler.adjust(ms.Tensor(False))
    assert float(scaler.scale(ms.Tensor(3.0))) == 3.0


# ---- clipping ------------------------------------------------------------------------------------


def gradients(norm):
    """Three arrays with a global norm of `norm`."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((3, 5), (7,), ())]
    length = np.sqrt(sum((a**2).sum() for a in arrays))
    return [np.asarray(a * norm / length, np.float32) for a in arrays]


@pytest.mark.parametrize("norm, limit", [(10.0, 1.0), (0.5, 1.0), (10.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1e-7, 1e-7)])
def test_clipping_matches_pytorch(mode, norm, limit):
    """The factor is min(1, limit / (norm + 1e-6)); a limit of 0 only measures."""
    clipper, grads = GradNormClipper(limit), gradients(norm)
    found = Clip(clipper)(*map(ms.Tensor, grads))
    factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    assert float(clipper.norm) == pytest.approx(norm, rel=1e-5)
    for clipped, grad in zip(found, grads):
        assert clipped.shape == grad.shape
        np.testing.assert_allclose(clipped.asnumpy(), grad * factor, rtol=1e-5)


def test_the_norm_is_from_the_last_call(mode):
    clipper = GradNormClipper(1.0)
    cell = Clip(clipper)
    for norm in (3.0, 0.25):
        cell(*map(ms.Tensor, gradients(norm)))
        assert float(clipper.norm) == pytest.approx(norm, rel=1e-5)


def test_the_norm_of_half_precision_gradients_is_computed_in_float32(mode):
    """300^2 overflows in float16. The gradients keep their dtypes. (The CPU has no bf16 product.)"""
    clipper = GradNormClipper(1.0)
    found = Clip(clipper)(ms.Tensor([300.0, -400.0], ms.float16), ms.Tensor([1200.0], ms.float32))
    assert float(clipper.norm) == pytest.approx(1300.0, rel=1e-6)
    assert [g.dtype for g in found] == [ms.float16, ms.float32]
    np.testing.assert_allclose(found[0].to(ms.float32).asnumpy(), [300 / 1300, -400 / 1300], rtol=1e-2)
    np.testing.assert_allclose(found[1].asnumpy(), [1200 / 1300], rtol=1e-5)


def test_an_infinite_gradient_gives_an_infinite_norm(mode):
    clipper = GradNormClipper(1.0)
    Clip(clipper)(ms.Tensor([np.inf, 1.0], ms.float32), ms.Tensor([1.0], ms.float32))
    assert float(clipper.norm) == np.inf
