"""The mathematics of the models' layers, by operators that the backend runs fast and exactly.

MindSpore's CPU kernels for sums over an axis and for operands of unlike shapes run on one core; a matrix product with a column or a row
of ones does the same 3 to 30 times faster (docs/log.md has the numbers). On an NPU the fused operators that MindSpore documents for it
are used instead; that side has not been run by us.
"""

from __future__ import annotations

from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import nn, ops

ON_CPU = ms.get_context("device_target") == "CPU"
EPS = 1e-6  # of every norm in FLUX

# Primitives rather than functions of `ops`, here and in flux_blocks: a gradient taken within a backward pass, as recomputing takes it,
# cannot look into functions that decide by the types of their inputs.
_times, _times_transposed = ops.MatMul(), ops.MatMul(transpose_b=True)
_batch_times, _batch_times_transposed, _batch_transposed_times = (
    ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(transpose_a=True),
)  # fmt: skip
_softmax, _depend, _zeros_like = ops.Softmax(axis=-1), ops.Depend(), ops.ZerosLike()
_layer_norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=EPS)


@ops.constexpr
@lru_cache(None)
def ones(*shape):
    """A constant. Made where it is used: as an argument it would keep FLUX's blocks from sharing a graph."""
    return ms.Tensor(np.ones(shape, np.float32))


@ops.constexpr
@lru_cache(None)
def pair_swap(dim):
    """[dim, dim]: x times it is (-x1, x0, -x3, x2, ...)."""
    swap = np.zeros((dim, dim), np.float32)
    swap[range(1, dim, 2), range(0, dim, 2)] = -1.0
    swap[range(0, dim, 2), range(1, dim, 2)] = 1.0
    return ms.Tensor(swap)


def product(x, matrix):
    """x [..., k] times matrix [k, n]. Not ops.matmul: in a graph its gradient fails for operands of unlike ranks."""
    return _times(x.reshape((-1, x.shape[-1])), matrix).reshape(x.shape[:-1] + (matrix.shape[-1],))


def outer(column, row):
    """column [..., n, 1] times row [1, d], or a row [B, 1, d] for every element of the batch."""
    if not ON_CPU:
        return column * row
    return product(column, row) if row.ndim == 2 else _batch_times(column, row)


def mean(x):
    """The mean over the last axis, which stays as one of length 1."""
    return product(x, ones(x.shape[-1], 1) / x.shape[-1]) if ON_CPU else x.mean(-1, keep_dims=True)


def square_sum(x):
    """The sum of the squares of x, of any shape and type, a float32 scalar."""
    squares = ops.square(x.astype(ms.float32))
    if ON_CPU and x.ndim > 1:  # row by row: a product over all of 4e7 elements errs by 5e-3, over a row's by 1e-6
        squares = product(squares.reshape((x.shape[0], -1)), ones(x.size // x.shape[0], 1))
    return squares.sum()


def linear(x, layer):
    """x [..., in] times W [out, in] transposed plus b, [..., out]; `layer` is (W, b)."""
    out = ops.bias_add(
        _times_transposed(x.reshape((-1, x.shape[-1])), layer[0].astype(x.dtype)), layer[1].astype(x.dtype)
    )
    return out.reshape(x.shape[:-1] + (out.shape[-1],))


class _Int8Product(nn.Cell):
    """x [n, in] times the transpose of int8 codes [out, in] times their scales [out, 1].

    The weights in x's type are made where they are needed and let go: for the backward pass, which makes them again, the codes stay.
    """

    def construct(self, x, codes, scale):
        return _times_transposed(x, self.made(codes, scale, x))

    def bprop(self, x, codes, scale, out, gradient):
        return _times(gradient, self.made(codes, scale, gradient)), _zeros_like(codes), _zeros_like(scale)

    def made(self, codes, scale, factor):
        # Depending on the other factor: a graph would make the weights of all layers at its start, where nothing holds them back.
        codes, scale = _depend(codes, factor), _depend(scale, factor)
        spread = _times(scale, ones(1, codes.shape[1])) if ON_CPU else scale
        return (codes.astype(ms.float32) * spread).astype(factor.dtype)


_int8_product = _Int8Product()


def int8_linear(x, layer):
    """x [..., in] times W [out, in] transposed plus b; `layer` is (int8 codes [out, in], b or None, scales [out, 1]), W their product."""
    out = _int8_product(x.reshape((-1, x.shape[-1])), layer[0], layer[2])
    out = out if layer[1] is None else ops.bias_add(out, layer[1].astype(x.dtype))
    return out.reshape(x.shape[:-1] + (out.shape[-1],))


def adapted_linear(x, layer):
    """`linear` plus x A^T B^T; `layer` is (W, b, A [rank, in], B [out, rank])."""
    return linear(x, layer) + _low_rank(x, layer[2], layer[3])


def adapted_int8_linear(x, layer):
    """`int8_linear` plus x A^T B^T; `layer` is (codes, b, scales, A [rank, in], B [out, rank])."""
    return int8_linear(x, layer) + _low_rank(x, layer[3], layer[4])


def _low_rank(x, a, b):
    low = _times_transposed(x.reshape((-1, x.shape[-1])), a.astype(x.dtype))
    return _times_transposed(low, b.astype(x.dtype)).reshape(x.shape[:-1] + (b.shape[0],))


def tanh_gelu(x):
    """GELU by tanh (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415): (1 + tanh(u)) / 2 is sigmoid(2u). Any shape."""
    return x * ops.sigmoid(x * (1.5957691216057308 + 0.07135481627 * ops.square(x)))


def modulated_norm(x, scale, shift):
    """Layer norm of x [B, T, d] over d, times 1 + scale plus shift, [B, 1, d] each; computed in float32, in x's type at the end.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2.
    """
    wide, scale, shift = x.astype(ms.float32), 1.0 + scale.astype(ms.float32), shift.astype(ms.float32)
    if not ON_CPU:
        return (_layer_norm(wide, ones(x.shape[-1]), 0.0 * ones(x.shape[-1]))[0] * scale + shift).astype(x.dtype)
    centred = wide + outer(-mean(wide), ones(1, x.shape[-1]))
    column = ops.rsqrt(mean(centred * centred) + EPS)
    return (centred * outer(column, scale) + outer(ones(*column.shape), shift)).astype(x.dtype)


def rms_norm(x, weight):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, [..., dim], in float32 (https://arxiv.org/abs/1910.07467)."""
    x, weight = x.astype(ms.float32), weight.astype(ms.float32)
    if not ON_CPU:
        return ops.rms_norm(x, weight, EPS)[0]
    return x * outer(ops.rsqrt(mean(x * x) + EPS), weight.reshape((1, -1)))


def rotate(x, rotary):
    """Turns pairs of neighbouring channels of x float32 [B, T, heads, dim] (https://arxiv.org/abs/2104.09864).

    `rotary`: cosines and sines, float32 [T, heads or 1, dim] each.
    """
    cos, sin = rotary
    return x * cos + product(x, pair_swap(x.shape[-1])) * sin


def add_gated(x, gate, y):
    """x + gate y; x, y [B, T, d], gate [B, 1, d]."""
    return x + outer(ones(x.shape[0], x.shape[1], 1).astype(gate.dtype), gate) * y


class _Attention(nn.Cell):
    """The backward pass has the sum in a softmax's gradient, over S keys, as that of output times its gradient over dim channels
    (Dao et al., FlashAttention, arXiv 2205.14135, appendix B.2), and subtracts it within a matrix product."""

    def construct(self, q, k, v):
        """The output, and the weights [B, heads, T, S], which are for the backward pass alone."""
        weights = _softmax(_batch_times_transposed(q * (q.shape[-1] ** -0.5), k))
        return _batch_times(weights, v), weights

    def bprop(self, q, k, v, outputs, gradients):
        scale, (out, weights), dout = q.shape[-1] ** -0.5, outputs, gradients[0]
        inner = product(out * dout, ones(out.shape[-1], 1).astype(out.dtype))
        minus_ones = -ones(*v.shape[:-1], 1).astype(out.dtype)
        scores = weights * _batch_times_transposed(ops.cat((dout, inner), -1), ops.cat((v, minus_ones), -1))
        return (
            _batch_times(scores, k) * scale,
            _batch_transposed_times(scores, q * scale),
            _batch_transposed_times(weights, dout),
        )


_attention = _Attention()


def attention(q, k, v):
    """softmax(q k^T / sqrt(dim)) v of q [B, heads, T, dim], k and v [B, heads, S, dim]; Ascend's flash attention if in half precision."""
    if ON_CPU or q.dtype == ms.float32:
        return _attention(q, k, v)[0]
    return ops.flash_attention_score(q, k, v, q.shape[1], scalar_value=q.shape[-1] ** -0.5, input_layout="BNSD")


class Timesteps(nn.Cell):
    """Sines and cosines of timesteps [B], float32 [B, channels] (https://arxiv.org/abs/1706.03762, section 3.5). Takes the place of `cell`.

    The frequencies are made once, on the host. mindone makes them by `ops.exp`, whose CPU kernel errs by up to 5e-6: at a timestep near
    1000 its sines are off by 8e-4.
    """

    def __init__(self, cell):
        super().__init__()
        half = cell.num_channels // 2
        frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - cell.downscale_freq_shift))
        self.frequencies, self.scale = ms.Tensor(frequencies, ms.float32), float(cell.scale)
        self.cosine_first = cell.flip_sin_to_cos

    def construct(self, timesteps):
        angles = self.scale * (timesteps[:, None].astype(ms.float32) * self.frequencies)
        waves = (ops.cos(angles), ops.sin(angles)) if self.cosine_first else (ops.sin(angles), ops.cos(angles))
        return ops.cat(waves, axis=-1)


class TanhGelu(nn.Cell):
    """`tanh_gelu` as a cell. mindone's computes the tanh by `ops.tanh`, whose CPU kernel errs by up to 1e-4."""

    def construct(self, x):
        return tanh_gelu(x)


@ops.constexpr
@lru_cache(None)
def _bucket_starts(exact, count, max_distance):
    """The distances at which the buckets after `exact` begin, from the host: float32 as PyTorch has it."""
    distances = np.arange(exact, max_distance + 1)
    ratio = np.log(distances.astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    buckets = np.minimum(exact + (ratio * (count - exact)).astype(np.int64), count - 1)
    return tuple(int(distances[np.argmax(buckets >= bucket)]) for bucket in range(exact + 1, count))


def relative_position_bucket(relative_position, bidirectional=True, num_buckets=32, max_distance=128):
    """The bucket of every distance between tokens, int64, the shape of `relative_position`.

    Half of the buckets are for each sign, and half of those for one distance each; the others grow by a constant factor up to
    `max_distance` (Raffel et al., arXiv 1910.10683, section 2.1). Where they begin is computed on the host: MindSpore's CPU log(2) is
    0.6931470, with which the distances 16, 32 and 64 fall into the buckets below.
    """
    count = num_buckets // 2 if bidirectional else num_buckets
    distance = (
        ops.abs(relative_position)
        if bidirectional
        else ops.maximum(-relative_position, ops.zeros_like(relative_position))
    )
    bucket = ops.minimum(distance, ops.full_like(distance, count // 2))
    for start in _bucket_starts(count // 2, count, max_distance):
        bucket = bucket + (distance >= start).astype(ms.int64)
    return bucket + count * (relative_position > 0).astype(ms.int64) if bidirectional else bucket


def _math_attention(query, key, value, attn_mask):
    """`attention` as mindone's cells call it; the models here use no masks."""
    return attention(query, key, value)


def _wide_attention(query, key, value, attn_mask):
    """The same in float32: Stable Diffusion 2.1 says by upcast_attention that its scores overflow in fp16."""
    wide = attention(query.astype(ms.float32), key.astype(ms.float32), value.astype(ms.float32))
    return wide.astype(query.dtype)


def use_operators(model: nn.Cell) -> nn.Cell:
    """Puts exact sinusoids, T5's buckets and tanh-GELU into a model in place, and on the CPU the attention of this file; returns it."""
    for _, cell in list(model.cells_and_names()):
        if ON_CPU and hasattr(cell, "math_attention_op"):
            cell.math_attention_op = _wide_attention if getattr(cell, "upcast_attention", False) else _math_attention
        if hasattr(cell, "_relative_position_bucket"):
            cell._relative_position_bucket = relative_position_bucket
        for child, part in cell.name_cells().items():
            if type(part).__name__ == "Timesteps" and not isinstance(part, Timesteps):
                setattr(cell, child, Timesteps(part))
            elif type(part).__name__ == "NewGELUActivation":
                setattr(cell, child, TanhGelu())
    return model
