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
