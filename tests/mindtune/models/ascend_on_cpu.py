"""The operators of `ascend_ops` that the CPU lacks, from operators that it has, to compare its functions."""

import mindspore as ms
from mindspore import ops

from mindtune.models import ascend_ops, fast_ops

_square, _rsqrt, _mean = ops.Square(), ops.Rsqrt(), ops.ReduceMean(keep_dims=True)
_batch_matmul, _softmax = ops.BatchMatMul(), ops.Softmax(-1)
_batch_matmul_transposed = ops.BatchMatMul(transpose_b=True)
_matmul_transposed = ops.MatMul(transpose_b=True)


def dense(x, weight, bias):
    out = _matmul_transposed(x.reshape((-1, x.shape[-1])), weight)
    if bias is not None:
        out = out + bias
    return out.reshape(x.shape[:-1] + (weight.shape[0],))


def gelu(x, approximate):
    return x * ops.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def layer_norm(x, shape, weight, bias, eps):
    wide = x.astype(ms.float32)
    centred = wide - _mean(wide, -1)
    normed = centred * _rsqrt(_mean(_square(centred), -1) + eps)
    return (normed * weight.astype(ms.float32) + bias.astype(ms.float32)).astype(x.dtype), weight, bias


def rms_norm(x, weight):
    wide = x.astype(ms.float32)
    rstd = _rsqrt(_mean(_square(wide), -1) + fast_ops.backend.EPS)
    return (wide * rstd * weight.astype(ms.float32)).astype(x.dtype), rstd


def rotary(x, cos, sin, mode):
    """Mode 1: pairs of neighbours, (x0, x1) -> (-x1, x0)."""
    pairs = x.reshape(x.shape[:-1] + (-1, 2))
    turned = ops.cat((-pairs[..., 1:], pairs[..., :1]), -1).reshape(x.shape)
    return x * cos + turned * sin


def addcmul(x, a, b):
    return x + a * b


def split(x, size, axis):
    return ops.Split(axis, x.shape[axis] // size)(x)


def split_with_size(x, sizes, axis):
    if axis == 1:
        return x[:, : sizes[0]], x[:, sizes[0] :]
    return x[..., : sizes[0]], x[..., sizes[0] :]


def pad(x, padding, value):
    return ops.Pad(((0, 0), (0, 0), (0, 0), padding))(x)


def index_select(table, axis, index):
    return ops.gather(table, index, axis)


def flash_attention(q, k, v, channels):
    assert q.shape[3] % 16 == 0
    wide, dtype = [x.astype(ms.float32).swapaxes(1, 2) for x in (q, k, v)], q.dtype
    weights = _softmax(_batch_matmul_transposed(wide[0], wide[1]) * channels**-0.5)
    return _batch_matmul(weights, wide[2]).swapaxes(1, 2).astype(dtype)


OPERATORS = {
    "_dense": dense,
    "_gelu": gelu,
    "layer_norm": layer_norm,
    "_rms_norm": rms_norm,
    "_rotary": rotary,
    "_addcmul": addcmul,
    "_split": split,
    "_split_with_size": split_with_size,
    "_pad": pad,
    "_index_select": index_select,
    "_flash_attention": flash_attention,
}


def use_ascend_operators(monkeypatch):
    """Makes `fast_ops` use `ascend_ops`, on the CPU."""
    for name, function in OPERATORS.items():
        monkeypatch.setattr(ascend_ops, name, function)
    monkeypatch.setattr(fast_ops, "backend", ascend_ops)
