"""The layer functions of `fast_ops` for Ascend, with the fused operators that MindSpore has for it.

Each computes in float32 inside and returns the dtype of its input. On a simulated device all of them are aclnn
operators (docs/ascend.md). We have not run them on an NPU; `python -m mindtune.doctor` compares them with NumPy there.
"""

from __future__ import annotations

from functools import lru_cache

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import auto_generate

from mindtune.models import cpu_ops

EPS = cpu_ops.EPS
FLASH_CHANNELS = 16  # flash attention wants a multiple of this many channels per head

_dense = auto_generate.Dense()
_gelu = auto_generate.GeluExt()
layer_norm = auto_generate.LayerNormExt()
_rms_norm = auto_generate.RmsNorm(EPS)
_rotary = auto_generate.RotaryPositionEmbedding()
_addcmul = auto_generate.AddcmulExt()
_split = auto_generate.SplitTensor()
_split_with_size = auto_generate.SplitWithSize()
_index_select = auto_generate.IndexSelect()
convolution = auto_generate.Conv2DExt()
_pad = auto_generate.ConstantPadND()
_matmul = ops.MatMul()
_matmul_transposed_b = ops.MatMul(transpose_b=True)
_depend = ops.Depend()


def square_sum(x):
    return ops.square(x.astype(ms.float32)).sum()


def dense(x, weight, bias):
    return _dense(x, weight, bias)


def add_bias(x, bias):
    return x + bias


class _Int8MatMul(nn.Cell):
    """As `cpu_ops._Int8MatMul`.

    In bfloat16 codes are exact, so the scales multiply the product and not the weights, and nothing of the weights'
    size is float32. Float16 would overflow: there the weights are scaled, in float32. No if statements: where a block
    is recomputed, MindSpore cannot differentiate them.
    """

    def construct(self, x, codes, scale):
        exact = x.dtype == ms.bfloat16
        return self.scale_product(x, codes, scale) if exact else self.scale_weights(x, codes, scale)

    def scale_product(self, x, codes, scale):
        return _matmul_transposed_b(x, _depend(codes, x).astype(x.dtype)) * scale.reshape((1, -1)).astype(x.dtype)

    def scale_weights(self, x, codes, scale):
        return _matmul_transposed_b(x, self.dequantise(codes, scale, x))

    def bprop(self, x, codes, scale, out, gradient):
        exact = gradient.dtype == ms.bfloat16
        dx = self.scale_gradient(gradient, codes, scale) if exact else self.weigh_gradient(gradient, codes, scale)
        return dx, ops.zeros(codes.shape, codes.dtype), ops.zeros(scale.shape, scale.dtype)

    def scale_gradient(self, gradient, codes, scale):
        scaled = gradient * scale.reshape((1, -1)).astype(gradient.dtype)
        return _matmul(scaled, _depend(codes, gradient).astype(gradient.dtype))

    def weigh_gradient(self, gradient, codes, scale):
        return _matmul(gradient, self.dequantise(codes, scale, gradient))

    def dequantise(self, codes, scale, factor):
        # Depends on the other factor: otherwise a graph computes the weights of all layers at its start and holds them.
        return (_depend(codes, factor).astype(ms.float32) * scale).astype(factor.dtype)


int8_matmul = _Int8MatMul()


def tanh_gelu(x):
    return _gelu(x, "tanh")


def modulated_norm(x, scale, shift):
    width = x.shape[-1]
    one, zero = cpu_ops.ones(width).astype(x.dtype), 0.0 * cpu_ops.ones(width).astype(x.dtype)
    return _addcmul(shift, layer_norm(x, (width,), one, zero, EPS)[0], 1.0 + scale)


def rms_norm(x, weight):
    return _rms_norm(x, weight)[0]


def rotary_table(wave, heads):
    return wave.reshape((1, wave.shape[0], 1, wave.shape[1]))


def rotate(x, rotary):
    return _rotary(x.astype(ms.float32), rotary[0], rotary[1], 1)  # 1: over pairs of neighbours


def add_gated(x, gate, y):
    return _addcmul(x, gate, y)


def attention(q, k, v):
    """Flash attention in half precision. No if statements: see `_Int8MatMul`."""
    return cpu_ops.attention(q, k, v) if q.dtype == ms.float32 else _half_attention(q, k, v)


def _half_attention(q, k, v):
    return _padded_attention(q, k, v) if q.shape[-1] % FLASH_CHANNELS else _flash_attention(q, k, v, q.shape[-1])


def _padded_attention(q, k, v):
    """Channels of zeros, which change no score, fill up the last multiple of 16."""
    channels = q.shape[-1]
    extra = -channels % FLASH_CHANNELS
    q, k, v = _pad(q, (0, extra), 0.0), _pad(k, (0, extra), 0.0), _pad(v, (0, extra), 0.0)
    return _split_with_size(_flash_attention(q, k, v, channels), (channels, extra), 3)[0]


def _flash_attention(q, k, v, channels):
    return ops.flash_attention_score(q, k, v, q.shape[2], scalar_value=channels**-0.5, input_layout="BSND")


def split(x, count):
    return _split(x, x.shape[-1] // count, x.ndim - 1)


def split_tokens(x, length):
    return _split_with_size(x, (length, x.shape[1] - length), 1)


def look_up(table, index):
    return _index_select(table, 0, index)


# ---- layers of UNets, VAEs and text encoders -----------------------------------------------------
# MindSpore's own cells call operators of an older kind here.


def construct_dense(self, x):
    return _dense(x, self.weight.astype(x.dtype), None if self.bias is None else self.bias.astype(x.dtype))


def construct_convolution(self, x):
    bias = self.bias.astype(x.dtype) if self.has_bias else None
    padding = self.padding if isinstance(self.padding, tuple) else (self.padding,) * 4
    return convolution(
        x, self.weight.astype(x.dtype), bias, self.stride, (padding[0], padding[2]), self.dilation, self.group
    )


def construct_layer_norm(self, x):
    weight, bias = self.weight, self.bias
    if weight is None:
        weight, bias = cpu_ops.ones(*self.normalized_shape), 0.0 * cpu_ops.ones(*self.normalized_shape)
    return layer_norm(x, self.normalized_shape, weight.astype(x.dtype), bias.astype(x.dtype), self.eps)[0]


def construct_mindspores_layer_norm(self, x):
    weight, bias = self.gamma.astype(x.dtype), self.beta.astype(x.dtype)
    return layer_norm(x, self.normalized_shape, weight, bias, self.epsilon)[0]


CONSTRUCTS = {
    nn.Dense: construct_dense,
    nn.Conv2d: construct_convolution,
    nn.LayerNorm: construct_mindspores_layer_norm,
}


@lru_cache(None)
def ascend_class(cls):
    """A class of cells that computes as `cls` does; `cls` itself if MindSpore's operators for it are good."""
    construct = CONSTRUCTS.get(cls)
    if cls.__name__ == "LayerNorm" and cls.__module__.startswith("mindone."):  # mindone 0.5 has mint's
        construct = construct_layer_norm
    return cls if construct is None else type(cls.__name__, (cls,), {"construct": construct})
