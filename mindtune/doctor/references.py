"""The operators and their gradients in NumPy, in the dtype of the inputs.

Every function takes the gradient of the loss by its output, `g`, and the inputs of the operator. It returns the output
and a tuple with the gradient by each input, or None where none is compared. `g` has the shape of the output.
"""

from __future__ import annotations

import math

import numpy as np

from mindtune.optim.adam8bit import dynamic_codes

NORM_EPS = 1e-6  # of FLUX's norms
GROUPS = 4  # of the group norm
STRIDE = 2  # of the convolution, which has 3x3 weights and a padding of 1
LAST = (-1,)


def rows(x):
    """x [..., d] as [n, d]."""
    return x.reshape(-1, x.shape[-1])


# ---- linear layers -------------------------------------------------------------------------------


def linear(g, x, w, b):
    return x @ w.T + b, (g @ w, rows(g).T @ rows(x), rows(g).sum(0))


def adapted_linear(g, x, w, b, a, up):
    out, (dx, dw, db) = linear(g, x, w, b)
    low, dlow = x @ a.T, g @ up
    return out + low @ up.T, (dx + dlow @ a, dw, db, rows(dlow).T @ rows(x), rows(g).T @ rows(low))


def int8_linear(g, x, codes, b, scale):
    out, (dx, _, db) = linear(g, x, codes * scale, b)
    return out, (dx, None, db, None)


# ---- activations ---------------------------------------------------------------------------------


def tanh_gelu(g, x):
    c = math.sqrt(2 / math.pi)
    tanh = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * c * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), (g * slope,)


def gelu(g, x):
    below = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * below, (g * (below + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)),)


def silu(g, x):
    sigmoid = 1 / (1 + np.exp(-x))
    return x * sigmoid, (g * (sigmoid + x * sigmoid * (1 - sigmoid)),)


# ---- norms ---------------------------------------------------------------------------------------


def normalise(x, axes, eps, centre=True):
    """x minus its mean (with `centre`), divided by the root of its mean square; and a function for the gradient."""
    centred = x - x.mean(axes, keepdims=True) if centre else x
    inverse = 1 / np.sqrt((centred**2).mean(axes, keepdims=True) + eps)
    normal = centred * inverse

    def gradient(dnormal):
        d = dnormal - normal * (dnormal * normal).mean(axes, keepdims=True)
        return inverse * (d - dnormal.mean(axes, keepdims=True) if centre else d)

    return normal, gradient


def modulated_norm(g, x, scale, shift):
    normal, gradient = normalise(x, LAST, NORM_EPS)
    return normal * (1 + scale) + shift, (
        gradient(g * (1 + scale)),
        (g * normal).sum(1, keepdims=True),
        g.sum(1, keepdims=True),
    )


def rms_norm(g, x, weight):
    normal, gradient = normalise(x, LAST, NORM_EPS, centre=False)
    return normal * weight, (gradient(g * weight), rows(g * normal).sum(0))


def layer_norm(g, x, weight, bias):
    normal, gradient = normalise(x, LAST, 1e-5)
    return normal * weight + bias, (gradient(g * weight), rows(g * normal).sum(0), rows(g).sum(0))


def group_norm(g, x, weight, bias):
    grouped = (x.shape[0], GROUPS, -1)
    normal, gradient = normalise(x.reshape(grouped), LAST, 1e-5)
    normal, column = normal.reshape(x.shape), (-1, 1, 1)
    dx = gradient((g * weight.reshape(column)).reshape(grouped)).reshape(x.shape)
    out = normal * weight.reshape(column) + bias.reshape(column)
    return out, (dx, (g * normal).sum((0, 2, 3)), g.sum((0, 2, 3)))


# ---- blocks --------------------------------------------------------------------------------------


def rotate(g, x, cos, sin):
    def swap(x):  # its transpose is -swap
        return np.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)

    return x * cos + swap(x) * sin, (g * cos - swap(g * sin), None, None)


def add_gated(g, x, gate, y):
    return x + gate * y, (g, (g * y).sum(1, keepdims=True), g * gate)


def attention(g, q, k, v):
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = g @ v.swapaxes(-1, -2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    return weights @ v, (scale * dscores @ k, scale * dscores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ g)


def square_sum(g, x):
    return (x**2).sum(), (2 * g * x,)


def timesteps(g, t, channels=320):
    """Stable Diffusion's: cosines first, and frequencies from exponents in float32, as in training."""
    exponents = np.float32(-math.log(10000.0)) * np.arange(channels // 2, dtype=np.float32) / np.float32(channels // 2)
    angles = t[:, None] * np.exp(exponents.astype(np.float64))
    return np.concatenate((np.cos(angles), np.sin(angles)), -1), (None,)


def convolution(g, x, weight, bias):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::STRIDE, ::STRIDE]
    out = np.einsum("bchwij,ocij->bohw", windows, weight) + bias.reshape(-1, 1, 1)
    dpadded, (height, width) = np.zeros_like(padded), (STRIDE * size for size in out.shape[2:])
    for i in range(3):
        for j in range(3):
            part = np.einsum("bohw,oc->bchw", g, weight[:, :, i, j])
            dpadded[:, :, i : i + height : STRIDE, j : j + width : STRIDE] += part
    return out, (dpadded[:, :, 1:-1, 1:-1], np.einsum("bchwij,bohw->ocij", windows, g), g.sum((0, 2, 3)))


# ---- optimizers ----------------------------------------------------------------------------------


def encode(g, x):
    """The codes of first moments x [blocks, BLOCK], numbers from 0 to 255."""
    scaled = x / np.abs(x).max(1, keepdims=True)
    return np.abs(scaled[..., None] - dynamic_codes(signed=True)).argmin(-1), (None,)


def decode(g, codes, scale):
    return dynamic_codes(signed=True)[codes.astype(int)] * scale, (None, None)


def adamw(g, parameter, *gradients, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1):
    """The parameter after an update with each gradient (arXiv 1711.05101, algorithm 2)."""
    m = v = 0.0
    for step, gradient in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        root = np.sqrt(v / (1 - beta2**step)) + eps
        parameter = parameter - lr * (m / (1 - beta1**step) / root + weight_decay * parameter)
    return parameter, (None,) * (1 + len(gradients))
