"""Replacements for operators of mindone 0.5.0 that have no CPU kernel in MindSpore; for tests in PyNative only.

`install()` replaces the `__call__` of the operators' classes, so that it affects every layer and function that uses
them. The replacements use operators with CPU kernels and gradients. They check how a step is built, not what an NPU
computes.
"""

from functools import cache

import mindspore as ms
import numpy as np
from mindspore import mint, ops
from mindspore.ops.auto_generate import gen_ops_prim

REPLACEMENTS = {}


def replaces(function):
    """Registers `function` as the replacement of the operator with its name."""
    REPLACEMENTS[function.__name__] = function
    return function


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


@replaces
def Arange(self, start, end, step, dtype=None):
    values = ms.Tensor(np.arange(*(v.item() if isinstance(v, ms.Tensor) else v for v in (start, end, step))))
    return values.to(dtype) if dtype is not None else values


@replaces
def LayerNormExt(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(normalized_shape), 0))
    mean = input.mean(axes, keep_dims=True)
    rstd = ops.rsqrt(ops.square(input - mean).mean(axes, keep_dims=True) + eps)
    out = (input - mean) * rstd
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


@cache
def convolution(channels, kernel, sides, stride, dilation, groups):
    return ops.Conv2D(channels, kernel, pad_mode="pad", pad=sides, stride=stride, dilation=dilation, group=groups)


@replaces
def Conv2DExt(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    sides = [side for side in pair(padding) for _ in range(2)]
    operator = convolution(weight.shape[0], weight.shape[2:], tuple(sides), pair(stride), pair(dilation), groups)
    out = operator(input, weight)
    return out if bias is None else out + bias.reshape((1, -1, 1, 1))


@replaces
def Embedding(self, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False):
    return ops.gather(weight, input, 0)


@replaces
def GeluExt(self, input, approximate="none"):
    return ops.gelu(input, approximate)


@replaces
def Outer(self, input, vec2):
    return input.reshape((-1, 1)) * vec2.reshape((1, -1))


@replaces
def RepeatInterleaveInt(self, input, repeats, dim=None, output_size=None):
    return ops.repeat_elements(input, repeats, dim)


@replaces
def ConstantPadND(self, input, padding, value=0.0):
    return ops.pad(input, tuple(padding), value=value)


@replaces
def FlashAttentionScore(
    self, query, key, value, real_shift=None, drop_mask=None, padding_mask=None, attn_mask=None, *rest
):
    """[batch, heads, tokens, dim]; True in the mask excludes. Computes in float32; no dropout."""
    assert self.input_layout == gen_ops_prim.str_to_enum("FlashAttentionScore", "input_layout", "BNSD")
    assert self.keep_prob == 1.0
    wide = [each.astype(ms.float32) for each in (query, key, value)]
    scores = ops.matmul(wide[0], wide[1].swapaxes(-1, -2)) * self.scale_value
    if attn_mask is not None:
        scores = scores.masked_fill(attn_mask.astype(ms.bool_), -1e30)
    out = ops.matmul(ops.softmax(scores, -1), wide[2]).astype(query.dtype)
    return None, None, None, out


def install():
    """Installs the replacements for the rest of this process."""
    for name, function in REPLACEMENTS.items():
        getattr(gen_ops_prim, name).__call__ = function
    # These functions do not use the class of their operator.
    mint.nn.functional.gelu = lambda input, approximate="none": ops.gelu(input, approximate)
    mint.stack = lambda tensors, dim=0: ops.stack(tensors, dim)
    # The gradient of the original uses stack.
    mint.unbind = lambda input, dim=0: tuple(part.squeeze(dim) for part in ops.split(input, 1, dim))
