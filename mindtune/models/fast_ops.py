"""Layer functions of FLUX and Stable Diffusion, written with operators that are fast and accurate on the backend.

`cpu_ops` has them for the CPU and `ascend_ops` for Ascend, under the same names. Both use primitives rather than
functions of `ops` where a block calls them: recomputation takes a gradient within a backward pass, and that fails for
functions that branch on the types of their inputs.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import ops

from mindtune.models.cpu_ops import ones

ON_CPU = ms.get_context("device_target") == "CPU"

if ON_CPU:
    from mindtune.models import cpu_ops as backend
else:
    from mindtune.models import ascend_ops as backend

SMALLEST_SQUARE = 1e-12  # a weight's row of zeros has norm 1e-6 in DoRA's division

_matmul = ops.MatMul()
_matmul_transposed_b = ops.MatMul(transpose_b=True)
_transpose = ops.Transpose()


def square_sum(x):
    """The sum of the squares of x, which has any shape and dtype. Returns a float32 scalar."""
    return backend.square_sum(x)


# ---- linear layers -------------------------------------------------------------------------------


def linear(x, layer):
    """x [..., in] times the transpose of W [out, in], plus b. `layer` is (W, b). Returns [..., out]."""
    return backend.dense(x, layer[0].astype(x.dtype), layer[1].astype(x.dtype))


def int8_linear(x, layer):
    """`linear` with int8 weights. `layer` is (codes [out, in], b or None, scales [out, 1]); W is codes times scales."""
    out = backend.int8_matmul(x.reshape((-1, x.shape[-1])), layer[0], layer[2])
    out = out if layer[1] is None else backend.add_bias(out, layer[1].astype(x.dtype))
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


def dora_linear(x, layer):
    """`linear` with W + B A whose rows are scaled to the norms m. `layer` is (W, b, A [rank, in], B [out, rank], m, s).

    s holds the squared norms of the rows of W. m and s are [out], float32. The norms of W + B A are constants in the
    backward pass.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353), equation 5 and section 4.3.
    """
    rows, weight = x.reshape((-1, x.shape[-1])), layer[0].astype(x.dtype)
    out = _matmul_transposed_b(rows, weight) + _low_rank(rows, layer[2], layer[3])
    return _scale_to_norms(x, out, _matmul_transposed_b(layer[2].astype(x.dtype), weight), layer[1], layer[2:])


def dora_int8_linear(x, layer):
    """`dora_linear` with int8 weights. `layer` is (codes, b, scales, A, B, m, s); W is codes times scales."""
    rows = x.reshape((-1, x.shape[-1]))
    out = backend.int8_matmul(rows, layer[0], layer[2]) + _low_rank(rows, layer[3], layer[4])
    products = backend.int8_matmul(layer[3].astype(x.dtype), layer[0], layer[2])
    return _scale_to_norms(x, out, products, layer[1], layer[3:])


def _scale_to_norms(x, out, products, bias, adapter):
    """out [n, out] times m / norms, plus the bias, in the shape of x. `products` is A W^T, `adapter` is (A, B, m, s).

    The squared norms of the rows of W + B A are s + 2 rowsum(W A^T * B) + rowsum(B A A^T * B): W + B A is never built.
    m / norms - 1 is rounded to half precision, not m / norms: near 1 that keeps small changes of m.
    """
    a, b, magnitude, squares = adapter
    wide_a, wide_b = a.astype(ms.float32), b.astype(ms.float32)
    products = products.astype(ms.float32)
    # Without numbers where it can be: PyNative would copy each to the device.
    terms = products + products + _matmul_transposed_b(_matmul_transposed_b(wide_a, wide_a), wide_b)
    squares = squares + _matmul(ones(1, a.shape[0]), terms * _transpose(wide_b, (1, 0))).reshape((-1,))
    norms = ops.stop_gradient(ops.sqrt(ops.maximum(squares, SMALLEST_SQUARE)))
    change = ((magnitude - norms) / norms).astype(x.dtype).reshape((1, 1, -1))
    wide = out.expand_dims(0)
    out = backend.add_bias(backend.add_gated(wide, change, wide).reshape(out.shape), bias.astype(x.dtype))
    return out.reshape(x.shape[:-1] + (out.shape[-1],))


def lokr_linear(x, layer):
    """`linear` plus x times the transpose of w1 ⊗ w2. `layer` is (W, b, w1, w2), or (W, b, w1, w2_a, w2_b).

    w1 is [l, m], w2 or w2_a w2_b is [k, n], W is [l k, m n]. The Kronecker product is never built.

    Source: Yeh et al. (arXiv 2309.14859), section 3.4, and the identity (w1 ⊗ w2) vec(X) = vec(w1 X w2^T).
    """
    return linear(x, layer) + _kronecker(x, layer[2:])


def lokr_int8_linear(x, layer):
    """`lokr_linear` with int8 weights. `layer` is (codes, b, scales, w1, w2) or (codes, b, scales, w1, w2_a, w2_b)."""
    return int8_linear(x, layer) + _kronecker(x, layer[3:])


def _kronecker(x, factors):
    """x [..., m n] times the transpose of w1 ⊗ w2: [..., l k]. Per row, w1 times the m rows of n values times w2^T."""
    left = factors[0].astype(x.dtype)
    right = factors[1].astype(x.dtype)
    right = right if len(factors) == 2 else _matmul(right, factors[-1].astype(x.dtype))
    (outer, middle), (inner, last) = left.shape, right.shape
    count = x.size // (middle * last)
    out = _matmul_transposed_b(x.reshape((count * middle, last)), right).reshape((count, middle, inner))
    out = _matmul_transposed_b(_transpose(out, (0, 2, 1)).reshape((count * inner, middle)), left)
    return _transpose(out.reshape((count, inner, outer)), (0, 2, 1)).reshape(x.shape[:-1] + (outer * inner,))


# ---- activations, norms, attention ---------------------------------------------------------------


def tanh_gelu(x):
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415), for any shape."""
    return backend.tanh_gelu(x)


def modulated_norm(x, scale, shift):
    """Layer norm of x [B, T, d] over d, times 1 + scale, plus shift, [B, 1, d] each.

    Float32 inside, the dtype of x outside.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3.2.
    """
    return backend.modulated_norm(x, scale, shift)


def rms_norm(x, weight):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (https://arxiv.org/abs/1910.07467).

    Computed in float32. On the CPU the result is float32, on Ascend it has the dtype of x.
    """
    return backend.rms_norm(x, weight)


def rotary_table(wave, heads):
    """A table of cosines or sines float32 [T, dim] in the shape that `rotate` takes."""
    return backend.rotary_table(wave, heads)


def rotate(x, rotary):
    """Rotary position embedding (arXiv 2104.09864) of x [B, T, heads, dim], over pairs of neighbouring channels.

    `rotary` is (cosines, sines), each from `rotary_table`. Returns float32.
    """
    return backend.rotate(x, rotary)


def add_gated(x, gate, y):
    """x + gate y, with x and y [B, T, d] and gate [B, 1, d]."""
    return backend.add_gated(x, gate, y)


def attention(q, k, v):
    """softmax(q k^T / sqrt(dim)) v, with q [B, T, heads, dim] and k and v [B, S, heads, dim]. Returns the shape of q.

    On Ascend, half precision uses the fused flash attention.
    """
    return backend.attention(q, k, v)


# ---- parts of tensors ----------------------------------------------------------------------------


def split(x, count):
    """`count` equal parts of the last axis."""
    return backend.split(x, count)


def split_tokens(x, length):
    """x [B, T, d] as its first `length` tokens and the rest."""
    return backend.split_tokens(x, length)


def look_up(tables, index):
    """The rows `index` [T, 1], int32, of each of the `tables` [N, dim]. Returns [T, dim] for each."""
    return [backend.look_up(table, index.reshape((-1,))) for table in tables]
