"""Layer functions of FLUX and Stable Diffusion, written with operators that are fast and accurate on the backend.

`cpu_ops` has them for the CPU and `ascend_ops` for Ascend, under the same names. Both use primitives rather than
functions of `ops` where a block calls them: recomputation takes a gradient within a backward pass, and that fails for
functions that branch on the types of their inputs.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import ops

ON_CPU = ms.get_context("device_target") == "CPU"

if ON_CPU:
    from mindtune.models import cpu_ops as backend
else:
    from mindtune.models import ascend_ops as backend

_matmul_transposed_b = ops.MatMul(transpose_b=True)


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
