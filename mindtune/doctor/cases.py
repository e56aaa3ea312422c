"""The operators that are checked: each with its inputs, its NumPy reference, and what its error may be.

A case calls the operator by its public name with inputs in the layout of the reference. If an operator takes another
layout, its function here is the only place to change.
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Callable, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.doctor import references
from mindtune.models import ascend_ops, fast_ops, int8
from mindtune.models.replaced_layers import Timesteps
from mindtune.optim.adam8bit import BLOCK, AdamW8bit, Quantiser, dynamic_codes
from mindtune.optim.adamw import AdamW

ALL = ("float32", "float16", "bfloat16")
SINGLE = ("float32",)
# Head sizes of Stable Diffusion 1.5 (40, 80, 160), 2 and XL (64) and FLUX (128). Lengths that are no multiples of 16.
HEADS = (40, 64, 80, 128, 160)
LENGTHS = {"self": (77, 77), "cross": (100, 77)}


class Case(NamedTuple):
    """An operator with its inputs.

    Float64 inputs are converted to the dtype that is checked, others keep their dtype. `roundings` counts the roundings
    that an entry of the output or of a gradient passes through, `terms` is the length of its sums. A function that is
    `compiled` runs as a graph in graph mode; the others create cells that do.
    """

    name: str
    function: Callable
    reference: Callable
    inputs: list
    roundings: int
    terms: int = 1
    dtypes: tuple[str, ...] = ALL
    compiled: bool = True


# ---- the operators -------------------------------------------------------------------------------


def linear(x, w, b):
    return fast_ops.linear(x, (w, b))


def adapted_linear(x, w, b, a, up):
    return fast_ops.adapted_linear(x, (w, b, a, up))


def int8_linear(x, codes, b, scale):
    return fast_ops.int8_linear(x, (codes, b, scale))


def tanh_gelu(x):
    return fast_ops.tanh_gelu(x)


def modulated_norm(x, scale, shift):
    return fast_ops.modulated_norm(x, scale, shift)


def rms_norm(x, weight):
    return fast_ops.rms_norm(x, weight)


def rotate(x, cos, sin):
    """The tables are [T, 1, dim]."""
    heads = x.shape[2]
    return fast_ops.rotate(x, (fast_ops.rotary_table(cos[:, 0], heads), fast_ops.rotary_table(sin[:, 0], heads)))


def add_gated(x, gate, y):
    return fast_ops.add_gated(x, gate, y)


def attention(q, k, v):
    """Heads before tokens, as in the reference."""
    return fast_ops.attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)).swapaxes(1, 2)


def square_sum(x):
    return fast_ops.square_sum(x)


def silu(x):
    return ops.silu(x)


def gelu(x):
    return ops.gelu(x, approximate="none")


def convolution(x, weight, bias):
    if fast_ops.ON_CPU:
        return ops.conv2d(x, weight, bias, stride=references.STRIDE, pad_mode="pad", padding=1)
    return ascend_ops.convolution(x, weight, bias, references.STRIDE, 1, 1, 1)


_layer_norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=1e-5)


def group_norm(x, weight, bias):
    return ops.group_norm(x, references.GROUPS, weight, bias)


def layer_norm(x, weight, bias):
    if fast_ops.ON_CPU:
        return _layer_norm(x, weight, bias)[0]
    return ascend_ops.layer_norm(x, weight.shape, weight, bias, 1e-5)[0]


class Encode(nn.Cell):
    """Codes of first moments, as float32."""

    def __init__(self):
        super().__init__()
        self.quantiser = Quantiser(signed=True)

    def construct(self, x):
        return self.quantiser.encode(x)[0].astype(ms.float32)


class Decode(nn.Cell):
    def __init__(self):
        super().__init__()
        self.quantiser = Quantiser(signed=True)

    def construct(self, codes, scale):
        return self.quantiser.decode(codes, scale)


def updated(optimizer_class, **settings):
    """A function that returns the parameter after an update with each gradient, as `references.adamw` does."""

    def update(parameter, *gradients):
        parameter = ms.Parameter(parameter, name="parameter")
        group = {"params": [parameter], "lr": 0.1, "weight_decay": 0.1}
        optimizer = optimizer_class([group], **settings)
        for gradient in gradients:
            optimizer((gradient,))
        return parameter.value()

    return update


# ---- their inputs --------------------------------------------------------------------------------


def normal(*shape, scale=1.0, seed=0):
    """Normally distributed numbers that depend on the arguments only, float64."""
    return scale * np.random.default_rng(zlib.crc32(f"{shape} {seed}".encode())).standard_normal(shape)


def quantised_weight(outputs, inputs):
    """int8 codes [outputs, inputs] and float32 scales [outputs, 1] of random weights."""
    codes, scale = np.empty((outputs, inputs), np.int8), np.empty((outputs, 1), np.float32)
    int8.quantise(normal(outputs, inputs, scale=inputs**-0.5), codes, scale)
    return codes, scale


def turning_tables(tokens, dim):
    """Cosines and sines, float32 [tokens, 1, dim] each, of angles up to 60."""
    angles = np.arange(tokens)[:, None, None] * 10000.0 ** -(np.arange(dim) // 2 / (dim / 2))
    return [np.float32(np.cos(angles)), np.float32(np.sin(angles))]


def moments(blocks):
    """Moments [blocks, BLOCK] that are nearer to one code than to any other, with a largest magnitude of 1."""
    rng, values = np.random.default_rng(0), dynamic_codes(signed=True)
    codes = rng.integers(1, 255, (blocks, BLOCK))
    codes[:, 0] = 255
    gap = np.minimum(values[codes] - values[codes - 1], values[np.minimum(codes + 1, 255)] - values[codes])
    return values[codes] + 0.4 * np.maximum(gap, 0) * rng.uniform(-1, 1, codes.shape)


# ---- the table -----------------------------------------------------------------------------------


def table(graph_mode: bool) -> list[Case]:
    """All cases. Call it after the mode of MindSpore is set."""
    ref = references
    x, w, b = normal(2, 77, 96), normal(64, 96, scale=0.1), normal(64)
    a, up = normal(4, 96, scale=0.1), normal(64, 4)
    codes, scale = quantised_weight(64, 96)
    row = [normal(2, 1, 96, seed=seed, scale=0.5) for seed in (1, 2)]
    image, kernel, bias = normal(2, 16, 11, 11), normal(8, 16, 3, 3, scale=0.1), normal(8)
    channels = [1 + normal(16, scale=0.1), normal(16, seed=1)]
    clock = SimpleNamespace(num_channels=320, downscale_freq_shift=0, scale=1, flip_sin_to_cos=True)
    weights, step = normal(65, 67, scale=0.1), normal(65, 67, seed=1)  # two moments of 17.01 blocks
    single = {"dtypes": SINGLE}
    host = {"dtypes": SINGLE, "compiled": False}
    found = [
        Case("linear", linear, ref.linear, [x, w, b], 3, 154),
        Case("adapted linear", adapted_linear, ref.adapted_linear, [x, w, b, a, up], 6, 154),
        Case("int8 linear", int8_linear, ref.int8_linear, [x, codes, b, scale], 5, 154),
        # Of sigmoid s, the gradient has 1 - s times x (1.6 + 0.21 x²), which is 20 for the largest x, 4.
        Case("tanh GELU", tanh_gelu, ref.tanh_gelu, [x], 20 + 6),
        Case("modulated norm", modulated_norm, ref.modulated_norm, [x + 2, *row], 8, 96),
        Case("RMS norm", rms_norm, ref.rms_norm, [normal(2, 77, 3, 128), 1 + normal(128, scale=0.1)], 8, 462),
        Case("rotate", rotate, ref.rotate, [normal(2, 77, 3, 128), *turning_tables(77, 128)], 4, 2, **single),
        Case("add gated", add_gated, ref.add_gated, [x, row[0], x[::-1]], 3, 77),
        Case("square sum", square_sum, ref.square_sum, [x], 3, x.size),
        Case("SiLU", silu, ref.silu, [x], 4 + 6),
        Case("GELU", gelu, ref.gelu, [x], 4 + 6),
        Case("layer norm", layer_norm, ref.layer_norm, [x, 1 + row[0][0, 0], row[1][0, 0]], 8, 154),
        Case("group norm", group_norm, ref.group_norm, [image, *channels], 8, 484),
        Case("convolution", convolution, ref.convolution, [image, kernel, bias], 3, 144),
        # An angle of up to 999 is rounded to float32: its sine has the error of 999 roundings.
        Case("timesteps", Timesteps(clock), ref.timesteps, [np.array([0, 1, 499, 999.0])], 999 + 4, **single),
        Case("8-bit encode", Encode(), ref.encode, [moments(8)], 1, **single),
        Case("8-bit decode", Decode(), ref.decode, [codes.view(np.uint8).reshape(-1, BLOCK), scale[:24]], 2, **single),
        # 1 - beta2 is 0.001: in float32 it has the error of 1000 roundings, half of that after the root.
        Case("AdamW", updated(AdamW), ref.adamw, [weights, step, step[::-1]], 500 + 12, **host),
        Case("8-bit AdamW", updated(AdamW8bit), ref.adamw, [weights, step], 500 + 12, **host),
    ]
    if graph_mode:
        offloaded = updated(AdamW, offload=True)
        found.append(Case("AdamW on the host", offloaded, ref.adamw, [weights, step, step[::-1]], 500 + 12, **host))
    for dim in HEADS:
        for kind, (queries, keys) in LENGTHS.items():
            inputs = [normal(2, 3, queries, dim), normal(2, 3, keys, dim, seed=1), normal(2, 3, keys, dim, seed=2)]
            # A score of up to 6 is an exponent: its weight has the error of 6 roundings more.
            terms = dim + queries + keys
            found.append(Case(f"attention {dim} {kind}", attention, ref.attention, inputs, 6 + 12, terms))
    return found
