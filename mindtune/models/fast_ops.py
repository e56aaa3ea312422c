"""Layer functions of FLUX and Stable Diffusion, written with operators that are fast and accurate on the backend.

MindSpore's CPU kernels for sums over an axis and for broadcasting run on one core. A matrix product with a column or a
row of ones computes the same 3 to 30 times faster (docs/log.md has the measurements). On an NPU the fused operators
that MindSpore documents for it are used instead; we have not run that side.
"""

from __future__ import annotations

from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import nn, ops

ON_CPU = ms.get_context("device_target") == "CPU"
EPS = 1e-6  # of every norm in FLUX

# Primitives rather than functions of `ops`, here and in flux_blocks: recomputation takes a gradient within a backward
# pass, and that fails for functions that branch on the types of their inputs.
_matmul = ops.MatMul()
_matmul_transposed_b = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()
_batch_matmul_transposed_a = ops.BatchMatMul(transpose_a=True)
_batch_matmul_transposed_b = ops.BatchMatMul(transpose_b=True)
_softmax = ops.Softmax(axis=-1)
_depend = ops.Depend()
_zeros_like = ops.ZerosLike()
_layer_norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=EPS)


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
    if not ON_CPU:
        return column * row
    return matmul(column, row) if row.ndim == 2 else _batch_matmul(column, row)


def mean(x):
    """The mean over the last axis, [..., 1]."""
    return matmul(x, ones(x.shape[-1], 1) / x.shape[-1]) if ON_CPU else x.mean(-1, keep_dims=True)


def square_sum(x):
    """The sum of the squares of x, which has any shape and dtype. Returns a float32 scalar."""
    squares = ops.square(x.astype(ms.float32))
    if ON_CPU and x.ndim > 1:  # per row: one product over all of 4e7 elements has an error of 5e-3, per row it is 1e-6
        squares = matmul(squares.reshape((x.shape[0], -1)), ones(x.size // x.shape[0], 1))
    return squares.sum()


# ---- linear layers -------------------------------------------------------------------------------


def linear(x, layer):
    """x [..., in] times the transpose of W [out, in], plus b. `layer` is (W, b). Returns [..., out]."""
    out = ops.bias_add(
        _matmul_transposed_b(x.reshape((-1, x.shape[-1])), layer[0].astype(x.dtype)), layer[1].astype(x.dtype)
    )
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
        scales = _matmul(scale, ones(1, codes.shape[1])) if ON_CPU else scale
        return (codes.astype(ms.float32) * scales).astype(factor.dtype)


_int8_matmul = _Int8MatMul()


def int8_linear(x, layer):
    """`linear` with int8 weights. `layer` is (codes [out, in], b or None, scales [out, 1]); W is codes times scales."""
    out = _int8_matmul(x.reshape((-1, x.shape[-1])), layer[0], layer[2])
    out = out if layer[1] is None else ops.bias_add(out, layer[1].astype(x.dtype))
    return out.reshape(x.shape[:-1] + (out.shape[-1],))


def adapted_linear(x, layer):
    """`linear` plus x A^T B^T. `layer` is (W, b, A [rank, in], B [out, rank])."""
    return linear(x, layer) + _low_rank(x, layer[2], layer[3])


def adapted_int8_linear(x, layer):
    """`int8_linear` plus x A^T B^T. `layer` is (codes, b, scales, A [rank, in], B [out, rank])."""
    return int8_linear(x, layer) + _low_rank(x, layer[3], layer[4])


def _low_rank(x, a, b):
    low = _matmul_transposed_b(x.reshape((-1, x.shape[-1])), a.astype(x.dtype))
    return _matmul_transposed_b(low, b.astype(x.dtype)).reshape(x.shape[:-1] + (b.shape[0],))


# ---- activations, norms, attention ---------------------------------------------------------------


def tanh_gelu(x):
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415), for any shape.

    (1 + tanh(u)) / 2 is written as sigmoid(2u).
    """
    return x * ops.sigmoid(x * (1.5957691216057308 + 0.07135481627 * ops.square(x)))


def modulated_norm(x, scale, shift):
    """Layer norm of x [B, T, d] over d, times 1 + scale, plus shift, [B, 1, d] each.

    Float32 inside, the dtype of x outside.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2.
    """
    wide, scale, shift = x.astype(ms.float32), 1.0 + scale.astype(ms.float32), shift.astype(ms.float32)
    if not ON_CPU:
        return (_layer_norm(wide, ones(x.shape[-1]), 0.0 * ones(x.shape[-1]))[0] * scale + shift).astype(x.dtype)
    centred = wide + outer_product(-mean(wide), ones(1, x.shape[-1]))
    inverse_std = ops.rsqrt(mean(centred * centred) + EPS)
    scaled = centred * outer_product(inverse_std, scale)
    return (scaled + outer_product(ones(*inverse_std.shape), shift)).astype(x.dtype)


def rms_norm(x, weight):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32 (https://arxiv.org/abs/1910.07467)."""
    x, weight = x.astype(ms.float32), weight.astype(ms.float32)
    if not ON_CPU:
        return ops.rms_norm(x, weight, EPS)[0]
    return x * outer_product(ops.rsqrt(mean(x * x) + EPS), weight.reshape((1, -1)))


def rotate(x, rotary):
    """Rotary position embedding (arXiv 2104.09864) of x float32 [B, T, heads, dim], over pairs of channels.

    `rotary` is (cosines, sines), float32 [T, heads or 1, dim] each.
    """
    cos, sin = rotary
    return x * cos + matmul(x, pair_swap(x.shape[-1])) * sin


def add_gated(x, gate, y):
    """x + gate y, with x and y [B, T, d] and gate [B, 1, d]."""
    return x + outer_product(ones(x.shape[0], x.shape[1], 1).astype(gate.dtype), gate) * y


class _Attention(nn.Cell):
    """softmax(q k^T / sqrt(dim)) v with a backward pass that avoids the sum over S keys in the gradient of softmax.

    That sum equals the sum of output times its gradient over the dim channels (Dao et al., FlashAttention, arXiv
    2205.14135, appendix B.2). It is subtracted within a matrix product.
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
    """softmax(q k^T / sqrt(dim)) v, with q [B, heads, T, dim] and k and v [B, heads, S, dim].

    On an NPU, half precision uses the fused flash attention.
    """
    if ON_CPU or q.dtype == ms.float32:
        return _attention(q, k, v)[0]
    return ops.flash_attention_score(q, k, v, q.shape[1], scalar_value=q.shape[-1] ** -0.5, input_layout="BNSD")
