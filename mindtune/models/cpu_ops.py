"""The layer functions of `fast_ops` for the CPU.

MindSpore's CPU kernels for sums over an axis and for broadcasting run on one core. A matrix product with a column or a
row of ones computes the same 3 to 30 times faster (docs/log.md has the measurements).
"""

from __future__ import annotations

from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import nn, ops

EPS = 1e-6  # of every norm in FLUX

_matmul = ops.MatMul()
_matmul_transposed_b = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()
_batch_matmul_transposed_a = ops.BatchMatMul(transpose_a=True)
_batch_matmul_transposed_b = ops.BatchMatMul(transpose_b=True)
_softmax = ops.Softmax(axis=-1)
_depend = ops.Depend()
add_bias = ops.bias_add
_zeros_like = ops.ZerosLike()


@ops.constexpr
@lru_cache(None)
def ones(*shape):
    """A float32 constant of ones.

    Made where it is used: as an argument it would keep FLUX's blocks from sharing a graph.
    """
    return ms.Tensor(np.ones(shape, np.float32))


@ops.constexpr
@lru_cache(None)
def pair_swap(dim):
    """The matrix [dim, dim] that maps x to (-x1, x0, -x3, x2, ...) when x is multiplied by it from the right."""
    swap = np.zeros((dim, dim), np.float32)
    swap[range(1, dim, 2), range(0, dim, 2)] = -1.0
    swap[range(0, dim, 2), range(1, dim, 2)] = 1.0
    return ms.Tensor(swap)


def matmul(x, matrix):
    """x [..., k] times matrix [k, n]. Not ops.matmul: in a graph its gradient fails for operands of different ranks."""
    return _matmul(x.reshape((-1, x.shape[-1])), matrix).reshape(x.shape[:-1] + (matrix.shape[-1],))


def outer_product(column, row):
    """column [..., n, 1] times row, which is [1, d] or has one row per sample, [B, 1, d]. Returns [..., n, d]."""
    return matmul(column, row) if row.ndim == 2 else _batch_matmul(column, row)


def mean(x):
    """The mean over the last axis, [..., 1]."""
    return matmul(x, ones(x.shape[-1], 1) / x.shape[-1])


def square_sum(x):
    squares = ops.square(x.astype(ms.float32))
    if x.ndim > 1:  # per row: one product over all of 4e7 elements has an error of 5e-3, per row it is 1e-6
        squares = matmul(squares.reshape((x.shape[0], -1)), ones(x.size // x.shape[0], 1))
    return squares.sum()


# ---- linear layers -------------------------------------------------------------------------------


def dense(x, weight, bias):
    out = add_bias(_matmul_transposed_b(x.reshape((-1, x.shape[-1])), weight), bias)
    return out.reshape(x.shape[:-1] + (out.shape[-1],))


class _Int8MatMul(nn.Cell):
    """x [n, in] times the transpose of W [out, in], where W is int8 codes [out, in] times scales [out, 1].

    W is computed in the dtype of x where it is needed and released afterwards: the backward pass computes it again, and
    keeps only the codes.
    """

    def construct(self, x, codes, scale):
        return _matmul_transposed_b(x, self.dequantise(codes, scale, x))

    def bprop(self, x, codes, scale, out, gradient):
        return _matmul(gradient, self.dequantise(codes, scale, gradient)), _zeros_like(codes), _zeros_like(scale)

    def dequantise(self, codes, scale, factor):
        # Depends on the other factor: otherwise a graph computes the weights of all layers at its start and holds them.
        codes, scale = _depend(codes, factor), _depend(scale, factor)
        return (codes.astype(ms.float32) * _matmul(scale, ones(1, codes.shape[1]))).astype(factor.dtype)


int8_matmul = _Int8MatMul()

# ---- activations, norms, attention ---------------------------------------------------------------


def tanh_gelu(x):
    # (1 + tanh(u)) / 2 is written as sigmoid(2u).
    return x * ops.sigmoid(x * (1.5957691216057308 + 0.07135481627 * ops.square(x)))


def modulated_norm(x, scale, shift):
    wide, scale, shift = x.astype(ms.float32), 1.0 + scale.astype(ms.float32), shift.astype(ms.float32)
    centred = wide + outer_product(-mean(wide), ones(1, x.shape[-1]))
    inverse_std = ops.rsqrt(mean(centred * centred) + EPS)
    scaled = centred * outer_product(inverse_std, scale)
    return (scaled + outer_product(ones(*inverse_std.shape), shift)).astype(x.dtype)


def layer_norm(x, weight, bias, eps):
    """Layer norm of x [..., d] over d, times weight, plus bias, [d] each (https://arxiv.org/abs/1607.06450)."""
    rows = x.astype(ms.float32).reshape((-1, x.shape[-1]))
    centred = rows + outer_product(-mean(rows), ones(1, rows.shape[1]))
    inverse_std = ops.rsqrt(mean(centred * centred) + eps)
    scaled = centred * outer_product(inverse_std, weight.astype(ms.float32).reshape((1, -1)))
    return add_bias(scaled, bias.astype(ms.float32)).reshape(x.shape).astype(x.dtype)


def group_norm(x, groups, weight, bias, eps):
    """Group norm of x [B, C, ...] over C / groups channels and their positions (https://arxiv.org/abs/1803.08494).

    It is multiplied by weight and bias is added, [C] each.
    """
    batch, channels = x.shape[:2]
    wide = x.astype(ms.float32)
    rows = wide.reshape((batch * groups, -1))
    centred = rows + outer_product(-_mean_of_groups(wide, groups), ones(1, rows.shape[1]))
    variance = _mean_of_groups((centred * centred).reshape(x.shape), groups)
    inverse_std = ops.rsqrt(variance + eps).reshape((batch, groups, 1))
    scale = (inverse_std * weight.astype(ms.float32).reshape((1, groups, -1))).reshape((batch * channels, 1))
    centred = centred.reshape((batch * channels, -1))
    scaled = centred * outer_product(scale, ones(1, centred.shape[1]))
    return add_bias(scaled.reshape(x.shape), bias.astype(ms.float32)).astype(x.dtype)


def _mean_of_groups(x, groups):
    """The mean of each group of channels of x [B, C, ...], [B groups, 1].

    First over the last axis, because a product adds one value after the other: 1e5 of them have an error of 1e-5.
    """
    return mean(mean(x).reshape((x.shape[0] * groups, -1)))


def rms_norm(x, weight):
    x, weight = x.astype(ms.float32), weight.astype(ms.float32)
    return x * outer_product(ops.rsqrt(mean(x * x) + EPS), weight.reshape((1, -1)))


def rotary_table(wave, heads):
    return ops.tile(wave.expand_dims(1), (1, heads, 1))  # broadcasting over the heads is slow


def rotate(x, rotary):
    cos, sin = rotary
    return x * cos + matmul(x, pair_swap(x.shape[-1])) * sin


def add_gated(x, gate, y):
    return x + outer_product(ones(x.shape[0], x.shape[1], 1).astype(gate.dtype), gate) * y


class _Attention(nn.Cell):
    """softmax(q k^T / sqrt(dim)) v of [B, heads, tokens, dim], with a fast backward pass.

    The gradient of softmax has a sum over S keys. It equals the sum of output times its gradient over the dim channels
    (Dao et al., FlashAttention, arXiv 2205.14135, appendix B.2), which is subtracted within a matrix product.
    """

    def construct(self, q, k, v):
        """The output, and the attention weights [B, heads, T, S], which only the backward pass needs."""
        weights = _softmax(_batch_matmul_transposed_b(q * (q.shape[-1] ** -0.5), k))
        return _batch_matmul(weights, v), weights

    def bprop(self, q, k, v, outputs, gradients):
        scale, (out, weights), dout = q.shape[-1] ** -0.5, outputs, gradients[0]
        inner = matmul(out * dout, ones(out.shape[-1], 1).astype(out.dtype))
        minus_ones = -ones(*v.shape[:-1], 1).astype(out.dtype)
        dscores = weights * _batch_matmul_transposed_b(ops.cat((dout, inner), -1), ops.cat((v, minus_ones), -1))
        return (
            _batch_matmul(dscores, k) * scale,
            _batch_matmul_transposed_a(dscores, q * scale),
            _batch_matmul_transposed_a(weights, dout),
        )


_attention = _Attention()


def attention(q, k, v):
    return _attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))[0].swapaxes(1, 2)


def split(x, count):
    return ops.Split(x.ndim - 1, count)(x)


def split_tokens(x, length):
    return x[:, :length], x[:, length:]


def look_up(table, index):
    return ops.gather(table, index, 0)


# ---- layers of UNets, VAEs and text encoders -----------------------------------------------------


def construct_layer_norm(self, x):
    return layer_norm(x, self.weight, self.bias, self.eps)


def construct_mindspores_layer_norm(self, x):
    return layer_norm(x, self.gamma, self.beta, self.epsilon)


def construct_group_norm(self, x):
    return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


MINDONES_CONSTRUCTS = {"LayerNorm": construct_layer_norm, "GroupNorm": construct_group_norm}


@lru_cache(None)
def fast_class(cls):
    """A class of cells that computes as `cls` does, but fast; `cls` itself if MindSpore's operators for it are good."""
    construct = construct_mindspores_layer_norm if cls is nn.LayerNorm else None
    if cls.__module__.startswith("mindone."):
        construct = MINDONES_CONSTRUCTS.get(cls.__name__)
    return cls if construct is None else type(cls.__name__, (cls,), {"construct": construct})
