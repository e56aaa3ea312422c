"""The same functions by operators that MindSpore's CPU backend runs faster or more exactly.

mindone's FLUX writes them with operators whose CPU kernels are slow: tanh-GELU and its gradient, a power of two, and taking pairs of
channels apart and together again. On an NPU those kernels are fast, and only norm and sinusoids are replaced.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import nn, ops


def tanh_gelu(x):
    """GELU by tanh (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415): (1 + tanh(u)) / 2 is sigmoid(2u). Any shape."""
    return x * ops.sigmoid(x * (1.5957691216057308 + 0.07135481627 * ops.square(x)))


class TanhGELU(nn.Cell):
    """`tanh_gelu` where a model holds a cell."""

    def construct(self, x):
        return tanh_gelu(x)


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, [..., dim] (https://arxiv.org/abs/1910.07467). Takes the place of `norm`."""

    def __init__(self, norm):
        super().__init__(auto_prefix=False)  # the parameter keeps its name
        self.weight, self.eps = norm.weight, norm.eps

    def construct(self, x):
        scale = ops.rsqrt(ops.square(x.astype(ms.float32)).mean(-1, keep_dims=True) + self.eps)
        return (x * scale * self.weight).astype(x.dtype)


@ms.jit_class
class RotaryEmbedding:
    """Rotates pairs of neighbouring channels (https://arxiv.org/abs/2104.09864). The swap of a pair is a product with a constant matrix."""

    def __init__(self, dim):
        swap = np.zeros((dim, dim), np.float32)
        swap[range(1, dim, 2), range(0, dim, 2)] = -1.0
        swap[range(0, dim, 2), range(1, dim, 2)] = 1.0
        self.swap = ms.Tensor(swap)

    def __call__(self, x, angles):
        """x [batch, heads, tokens, dim] in any type; angles: cosines and sines, float32 [tokens, dim] each."""
        cos, sin = angles
        wide = x.astype(ms.float32)
        swapped = ops.matmul(wide.reshape((-1, wide.shape[-1])), self.swap).reshape(wide.shape)
        return (wide * cos + swapped * sin).astype(x.dtype)


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


def use_fast_operators(model: nn.Cell) -> nn.Cell:
    """Puts them into a model in place; parameters keep their names. On other devices than the CPU only norm and sinusoids change. The
    norm gives the type it takes: mindone's gives float32 when its weight is float32, and half-precision attention then has two types."""
    on_cpu = ms.get_context("device_target") == "CPU"
    for _, cell in list(model.cells_and_names()):
        kind, processor = type(cell).__name__, getattr(cell, "processor", None)
        if type(processor).__name__.startswith("FluxAttn"):
            _replace_norms(cell)
            if on_cpu:
                processor.apply_rotary_emb = RotaryEmbedding(cell.norm_q.weight.shape[0])
        elif on_cpu and kind == "GELU" and getattr(cell, "approximate", None) == "tanh":
            cell.gelu = tanh_gelu
        elif on_cpu and kind == "FluxSingleTransformerBlock":
            cell.act_mlp = TanhGELU()
        for child, part in cell.name_cells().items():
            if type(part).__name__ == "Timesteps":
                setattr(cell, child, Timesteps(part))
    return model


def _replace_norms(attention: nn.Cell) -> None:
    for place in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        if norm := getattr(attention, place, None):
            name = norm.weight.name
            setattr(attention, place, RMSNorm(norm))
            norm.weight.name = name  # a cell put into its place anew calls its parameters by the place alone
