"""Frozen int8 weights: the codes and scales, the layers that read them, and models that are loaded with them."""

import json
import shutil
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from flux_gradients import (
    FLOAT16,
    FLOAT32,
    add_adapter,
    assert_close,
    loss_and_gradients,
    loss_of,
    random_values,
    recompute,
)
from mindspore import nn, ops
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.models import fast_ops, int8, loading, named_parameters, precision
from mindtune.models.weights import weight_files

pytestmark = pytest.mark.slow

# black-forest-labs/FLUX.1-dev's transformer; the other values are defaults of the class.
FLUX_DEV = {
    "guidance_embeds": True,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
}


def quantised(weight):
    codes, scale = np.empty(weight.shape, np.int8), np.empty((len(weight), 1), np.float32)
    int8.quantise(weight, codes, scale)
    return codes, scale


# ---- codes and scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, precision.NUMPY_DTYPES[ms.bfloat16]])
def test_weights_are_codes_times_the_scale_of_their_row(dtype, monkeypatch):
    """The largest magnitude of a row has code 127, every weight the nearest code. The chunk size has no effect."""
    weight = (random_values(7, 30) * np.array([[1e-3, 1, 5, 20, 1e2, 1, 1]]).T).astype(dtype)
    codes, scale = quantised(weight)
    wide = weight.astype(np.float64)
    np.testing.assert_allclose(scale[:, 0], np.abs(wide).max(1) / 127, rtol=1e-6)
    assert (np.abs(codes.astype(int)).max(1) == 127).all()
    assert (np.abs(codes * scale.astype(np.float64) - wide) <= 0.5001 * scale).all()
    monkeypatch.setattr(int8, "CHUNK_SIZE", 60)  # two rows per chunk, the last chunk has one
    for found, expected in zip(quantised(weight), (codes, scale)):
        np.testing.assert_array_equal(found, expected)


def test_a_row_of_zeros_stays_zero():
    codes, scale = quantised(np.stack([np.zeros(5), np.arange(5)]).astype(np.float32))
    assert (codes[0] == 0).all() and np.isfinite(scale).all() and codes[1].tolist() == [0, 32, 64, 95, 127]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_rejected(value):
    with pytest.raises(ValueError, match="not finite"):
        quantised(np.array([[1.0, value]], np.float32))


# ---- layers --------------------------------------------------------------------------------------


class Int8Linear(nn.Cell):
    def construct(self, x, codes, bias, scale):
        return fast_ops.int8_linear(x, (codes, bias, scale))


class AdaptedInt8Linear(nn.Cell):
    def construct(self, x, codes, bias, scale, a, b):
        return fast_ops.adapted_int8_linear(x, (codes, bias, scale, a, b))


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float16, 4e-3)])
@pytest.mark.parametrize("shape", [(3, 20), (2, 5, 20)])
def test_a_layer_and_its_gradient(mode, dtype, tolerance, shape):
    """Against NumPy with dequantised weights. The gradient of x is the gradient of the output times the weights."""
    codes, scale = quantised(random_values(11, 20))
    x, bias = random_values(*shape, seed=1).astype(dtype), random_values(11, seed=2)
    weight = (codes * scale).astype(np.float64)
    gradient = random_values(*shape[:-1], 11, seed=3).astype(dtype)
    tensors = [ms.Tensor(array) for array in (x, codes, bias, scale)]
    assert_close([Int8Linear()(*tensors).asnumpy()], [x @ weight.T + bias], tolerance)
    found = ops.GradOperation(sens_param=True)(Int8Linear())(*tensors, ms.Tensor(gradient))
    assert_close([found.asnumpy()], [gradient @ weight], tolerance)
    assert found.dtype == tensors[0].dtype
    a, b = random_values(4, 20, seed=4), random_values(11, 4, seed=5)
    found = AdaptedInt8Linear()(*tensors, ms.Tensor(a), ms.Tensor(b)).asnumpy()
    assert_close([found], [x @ weight.T + bias + x.astype(float) @ a.T @ b.T], tolerance)


MEMORY_GROWTH = """
import sys
from pathlib import Path
import mindspore as ms, numpy as np
from mindspore import nn, ops
from mindtune.models import execution, fast_ops

class Chain(nn.Cell):
    def __init__(self, depth):
        super().__init__()
        codes = [ms.Tensor(np.full((1024, 1024), n, np.int8)) for n in range(depth)]
        scales = [ms.Tensor(np.full((1024, 1), 1e-5 * (n + 1), np.float32)) for n in range(depth)]
        make = lambda name, values: ms.ParameterTuple(
            [ms.Parameter(value, name=f"{name}{n}", requires_grad=False) for n, value in enumerate(values)]
        )
        self.codes = make("codes", codes)
        self.scales = make("scale", scales)

    def construct(self, x):
        for codes, scale in zip(self.codes, self.scales):
            x = ops.tanh(fast_ops.int8_linear(x, (codes, None, scale)))
        return x.sum()

def own_memory():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10

execution.set_up_device(graph_mode=sys.argv[1] == "0")
gradient = ops.GradOperation()(Chain(int(sys.argv[2])))
before = own_memory()
gradient(ms.Tensor(np.ones((2, 1024), np.float32))).asnumpy()
print(own_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dequantised_weights_are_released(mode, tmp_path):
    """The memory of a forward and backward pass grows by less than one float32 weight (4 MB) per additional layer.

    It would grow by that much if the weights of the forward pass were kept for the backward pass. MindSpore's memory
    pool keeps what a pass allocates, so each depth needs a new process.
    """
    script = tmp_path / "growth.py"
    script.write_text(MEMORY_GROWTH)
    growth = []
    for depth in (8, 48):
        done = subprocess.run(
            [sys.executable, script, str(mode), str(depth)], stdout=subprocess.PIPE, text=True, check=True
        )
        growth.append(int(done.stdout.splitlines()[-1]))
    assert (growth[1] - growth[0]) / 40 < 2 << 20, growth


# ---- models --------------------------------------------------------------------------------------


def load_int8(root, dtypes=FLOAT32):
    return loading.load_model(root, "transformer", dtypes, int8=True)


def load_dequantised(root, name="transformer"):
    """The float32 model with the weights of the int8 model."""
    model = loading.load_model(root, name, FLOAT32)
    precision.freeze_params(model)
    tensors = load_file(weight_files(root, name)[0])
    linear = {name for name, cell in model.cells_and_names() if isinstance(cell, precision.LINEAR_LAYERS)}
    for name, parameter in named_parameters.model_parameters(model).items():
        if name.rpartition(".")[0] in linear and name.endswith(".weight"):
            codes, scale = quantised(tensors[name])
            parameter.set_data(ms.Tensor(codes * scale))
    return model


@pytest.fixture(scope="module")
def expected(small_flux):
    """Loss and gradients of a LoRA on the dequantised model, in PyNative."""
    return loss_and_gradients(add_adapter(load_dequantised(small_flux)))


@pytest.mark.parametrize("mode, recomputed", [(1, False), (1, True), (0, True)], indirect=["mode"])
def test_lora_on_int8_matches_lora_on_the_dequantised_model(small_flux, expected, mode, recomputed):
    """Loss and every gradient, with adapters on every type of layer."""
    model = add_adapter(load_int8(small_flux))
    assert_close(loss_and_gradients(recompute(model) if recomputed else model), expected, 2e-5)


def test_int8_in_half_precision(small_flux, expected, mode):
    model = add_adapter(load_int8(small_flux, FLOAT16), compute=ms.float16)
    assert loss_of(model, ms.float16) == pytest.approx(expected[0], rel=3e-3)


def test_every_linear_layer_is_int8_and_everything_is_frozen(tiny_flux):
    model = load_int8(tiny_flux)
    layers = [cell for _, cell in model.cells_and_names() if isinstance(cell, precision.LINEAR_LAYERS)]
    assert len(layers) > 40 and all(layer.weight.dtype == ms.int8 for layer in layers)
    assert not model.trainable_params()
    others = [p for name, p in model.parameters_and_names() if not name.endswith(".weight") or ".norm" in name]
    assert all(p.dtype == ms.float32 for p in others if p.dtype != ms.int8)


def test_flux_dev_takes_little_more_than_a_byte_per_weight(tmp_path):
    """11.9 billion parameters in fewer than 1.01 bytes each, with scales, biases and norms. None is allocated."""
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "FluxTransformer2DModel", **FLUX_DEV}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    bfloat16 = precision.Precision(ms.bfloat16, ms.bfloat16)
    model = int8.use_int8(precision.cast_cell(loading._empty_model(tmp_path, "transformer", ms.bfloat16), bfloat16))
    size = sum(p.size * p.itemsize for p in model.get_parameters())
    weights = sum(p.size for name, p in model.parameters_and_names() if not name.endswith(".weight_scale"))
    assert weights == 11_901_408_320 and 1.0 < size / weights < 1.01


def test_t5_in_int8(tiny_flux):
    """Hidden states match the dequantised model's. In half precision `wo` stays in float32 and computes in float32."""
    ids = ms.Tensor(np.arange(1, 9)[None], ms.int32)
    expected = load_dequantised(tiny_flux, "text_encoder_2")(ids)[0].asnumpy()
    for dtypes, tolerance in ((FLOAT32, 1e-5), (FLOAT16, 5e-3)):
        model = loading.load_model(tiny_flux, "text_encoder_2", dtypes, int8=True)
        assert_close([model(ids)[0].to(ms.float32).asnumpy()], [expected], tolerance)
        layers = {
            name.rpartition(".")[2]: cell
            for name, cell in model.cells_and_names()
            if isinstance(cell, precision.LINEAR_LAYERS)
        }
        assert layers["wo"].in_float32 == (dtypes is FLOAT16) and not layers["q"].in_float32


def test_a_file_with_a_weight_that_is_not_finite_is_rejected(tiny_flux, tmp_path):
    root = shutil.copytree(tiny_flux, tmp_path / "flux")
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"proj_out.weight: a weight is not finite, which int8 cannot hold"):
        load_int8(root)
