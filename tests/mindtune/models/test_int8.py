"""Frozen weights in a byte each: the codes, the layers that read them, and models loaded with them."""

import json
import shutil
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from safetensors.numpy import load_file, save_file
from test_flux_blocks import FULL, TARGETS, blocks_of, close, measured, values

from mindtune.models import fast_ops, int8, loading, lora, precision
from mindtune.models.weights import weight_files

# black-forest-labs/FLUX.1-dev's transformer; the class has the rest of its numbers as defaults.
FLUX_DEV = {
    "guidance_embeds": True,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
}
HALF = precision.Precision(ms.float16, ms.float16)


def quantised(weight):
    codes, scale = np.empty(weight.shape, np.int8), np.empty((len(weight), 1), np.float32)
    int8.quantise(weight, codes, scale)
    return codes, scale


# ---- codes and scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, precision.NUMPY_TYPES[ms.bfloat16]])
def test_a_weight_is_its_code_times_its_rows_scale(dtype, monkeypatch):
    """A row's largest magnitude is 127 steps; every weight is the nearest step, within half of one. Row by row, whatever the chunk."""
    weight = (values(7, 30) * np.array([[1e-3, 1, 5, 20, 1e2, 1, 1]]).T).astype(dtype)
    codes, scale = quantised(weight)
    wide = weight.astype(np.float64)
    np.testing.assert_allclose(scale[:, 0], np.abs(wide).max(1) / 127, rtol=1e-6)
    assert (np.abs(codes.astype(int)).max(1) == 127).all()
    assert (np.abs(codes * scale.astype(np.float64) - wide) <= 0.5001 * scale).all()
    monkeypatch.setattr(int8, "CHUNK", 60)  # two rows at a time, and one
    for found, whole in zip(quantised(weight), (codes, scale)):
        np.testing.assert_array_equal(found, whole)


def test_a_row_of_zeros_stays_zero():
    codes, scale = quantised(np.stack([np.zeros(5), np.arange(5)]).astype(np.float32))
    assert (codes[0] == 0).all() and np.isfinite(scale).all() and codes[1].tolist() == [0, 32, 64, 95, 127]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        quantised(np.array([[1.0, bad]], np.float32))


# ---- layers --------------------------------------------------------------------------------------


class Product(nn.Cell):
    def construct(self, x, codes, bias, scale):
        return fast_ops.int8_linear(x, (codes, bias, scale))


class Adapted(nn.Cell):
    def construct(self, x, codes, bias, scale, a, b):
        return fast_ops.adapted_int8_linear(x, (codes, bias, scale, a, b))


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float16, 4e-3)])
@pytest.mark.parametrize("shape", [(3, 20), (2, 5, 20)])
def test_a_layer_and_its_gradient(mode, dtype, tolerance, shape):
    """As NumPy with the weights made beforehand; what x gets back is the outputs' gradient times the weights."""
    codes, scale = quantised(values(11, 20))
    x, bias, weight = values(*shape, seed=1).astype(dtype), values(11, seed=2), (codes * scale).astype(np.float64)
    gradient = values(*shape[:-1], 11, seed=3).astype(dtype)
    tensors = [ms.Tensor(each) for each in (x, codes, bias, scale)]
    close([Product()(*tensors).asnumpy()], [x @ weight.T + bias], tolerance)
    found = ops.GradOperation(sens_param=True)(Product())(*tensors, ms.Tensor(gradient))
    close([found.asnumpy()], [gradient @ weight], tolerance)
    assert found.dtype == tensors[0].dtype
    a, b = values(4, 20, seed=4), values(11, 4, seed=5)
    found = Adapted()(*tensors, ms.Tensor(a), ms.Tensor(b)).asnumpy()
    close([found], [x @ weight.T + bias + x.astype(float) @ a.T @ b.T], tolerance)


GROWTH = """
import sys
from pathlib import Path
import mindspore as ms, numpy as np
from mindspore import nn, ops
from mindtune import models, operators
from mindtune.weights import weight_files

class Chain(nn.Cell):
    def __init__(self, depth):
        super().__init__()
        weights = [np.full((1024, 1024), number, np.int8) for number in range(depth)]
        self.codes = ms.ParameterTuple([ms.Parameter(ms.Tensor(w), name=f"codes{n}", requires_grad=False) for n, w in enumerate(weights)])
        scales = [np.full((1024, 1), 1e-5 * (number + 1), np.float32) for number in range(depth)]
        self.scales = ms.ParameterTuple([ms.Parameter(ms.Tensor(s), name=f"scale{n}", requires_grad=False) for n, s in enumerate(scales)])

    def construct(self, x):
        for codes, scale in zip(self.codes, self.scales):
            x = ops.tanh(operators.int8_linear(x, (codes, None, scale)))
        return x.sum()

def own_memory():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10

models.set_up_device(graph_mode=sys.argv[1] == "0")
gradient = ops.GradOperation()(Chain(int(sys.argv[2])))
before = own_memory()
gradient(ms.Tensor(np.ones((2, 1024), np.float32))).asnumpy()
print(own_memory() - before)
"""


def test_no_layers_float_weight_is_kept(mode, tmp_path):
    """What a forward and backward pass takes, which the pool keeps, grows by less than a float32 weight (4 MB) for every layer more.

    That much would be kept if the weights that the forward pass makes were there for the backward pass.
    """
    script = tmp_path / "growth.py"
    script.write_text(GROWTH)
    grown = []
    for depth in (8, 48):
        done = subprocess.run(
            [sys.executable, script, str(mode), str(depth)], stdout=subprocess.PIPE, text=True, check=True
        )
        grown.append(int(done.stdout.splitlines()[-1]))
    assert (grown[1] - grown[0]) / 40 < 2 << 20, grown


# ---- models --------------------------------------------------------------------------------------


def int8_flux(root, kind=FULL):
    return loading.load_model(root, "transformer", kind, int8=True)


def dequantised(root, name="transformer"):
    """The float32 model that has the int8 one's weights."""
    model = loading.load_model(root, name, FULL)
    precision.freeze_params(model)
    tensors = load_file(weight_files(root, name)[0])
    linear = {name for name, cell in model.cells_and_names() if isinstance(cell, precision.LINEAR)}
    for name, parameter in loading.model_parameters(model).items():
        if name.rpartition(".")[0] in linear and name.endswith(".weight"):
            codes, scale = quantised(tensors[name])
            parameter.set_data(ms.Tensor(codes * scale))
    return model


def adapt(model, compute=ms.float32):
    lora.add_lora(model, 4, 6.0, 0.0, TARGETS, compute)
    for number, parameter in enumerate(lora.lora_parameters(model).values()):
        parameter.set_dtype(ms.float32)
        parameter.set_data(ms.Tensor(values(*parameter.shape, seed=number, scale=0.3)))
    return model


@pytest.mark.parametrize("recomputed", [False, True])
def test_lora_on_int8_is_lora_on_the_dequantised_model(tiny_flux, mode, recomputed):
    """Loss and every gradient, with adapters on every kind of layer."""
    model, plain = adapt(int8_flux(tiny_flux)), adapt(dequantised(tiny_flux))
    if recomputed:
        for block in blocks_of(model):
            block.recompute()
    close(measured(model), measured(plain), 2e-5)


def test_half_precision_on_int8(tiny_flux, mode):
    found, expected = (
        measured(adapt(int8_flux(tiny_flux, HALF), ms.float16), ms.float16),
        measured(adapt(dequantised(tiny_flux))),
    )
    assert found[0] == pytest.approx(expected[0], rel=3e-3)


def test_every_linear_layer_is_int8_and_everything_frozen(tiny_flux):
    model = int8_flux(tiny_flux)
    layers = [cell for _, cell in model.cells_and_names() if isinstance(cell, precision.LINEAR)]
    assert len(layers) > 40 and all(layer.weight.dtype == ms.int8 for layer in layers)
    assert not model.trainable_params()
    others = [p for name, p in model.parameters_and_names() if not name.endswith(".weight") or ".norm" in name]
    assert all(p.dtype == ms.float32 for p in others if p.dtype != ms.int8)


def test_bytes_of_a_weight_of_flux_dev(tmp_path):
    """11.9 billion parameters in fewer than 1.01 bytes each, scales, biases and norms included; none is ever allocated."""
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "FluxTransformer2DModel", **FLUX_DEV}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    half = precision.Precision(ms.bfloat16, ms.bfloat16)
    model = int8.use_int8(precision.cast_cell(loading._without_weights(tmp_path, "transformer", ms.bfloat16), half))
    size = sum(p.size * p.itemsize for p in model.get_parameters())
    weights = sum(p.size for name, p in model.parameters_and_names() if not name.endswith(".weight_scale"))
    assert weights == 11_901_408_320 and 1.0 < size / weights < 1.01


def test_t5_in_int8(tiny_flux):
    """The dequantised model's states; its `wo`, kept in float32 beside half precision, computes in float32 there too."""
    ids = ms.Tensor(np.arange(1, 9)[None], ms.int32)
    expected = dequantised(tiny_flux, "text_encoder_2")(ids)[0].asnumpy()
    for kind, tolerance in ((FULL, 1e-5), (HALF, 5e-3)):
        model = loading.load_model(tiny_flux, "text_encoder_2", kind, int8=True)
        close([model(ids)[0].to(ms.float32).asnumpy()], [expected], tolerance)
        layers = {
            name.rpartition(".")[2]: cell
            for name, cell in model.cells_and_names()
            if isinstance(cell, precision.LINEAR)
        }
        assert layers["wo"].wide == (kind is HALF) and not layers["q"].wide


def test_a_file_with_a_weight_that_is_not_finite(tiny_flux, tmp_path):
    root = shutil.copytree(tiny_flux, tmp_path / "flux")
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(loading.UserError, match=r"proj_out.weight: a weight is not finite, which int8 cannot hold"):
        int8_flux(root)
