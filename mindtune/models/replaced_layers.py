"""Layers that replace mindone's own, which are slow or inaccurate on a backend. `use_fast_ops` puts them in."""

from __future__ import annotations

from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.models.ascend_ops import ascend_class
from mindtune.models.fast_ops import ON_CPU, attention, tanh_gelu


class Timesteps(nn.Cell):
    """Sinusoidal embedding of timesteps [B], float32 [B, channels] (https://arxiv.org/abs/1706.03762, section 3.5).

    Replaces mindone's `cell`. The frequencies are computed once on the host: mindone uses `ops.exp`, whose CPU kernel
    has an error of up to 5e-6, and near timestep 1000 its sines are off by 8e-4. Their exponents are rounded to float32
    as PyTorch's are, with which the published models were trained: at guidance 3.5, an angle of 3500, exact ones differ
    by 1e-4.
    """

    def __init__(self, cell):
        super().__init__()
        half = cell.num_channels // 2
        exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
        exponents /= np.float32(half - cell.downscale_freq_shift)
        frequencies = np.exp(exponents.astype(np.float64))
        self.frequencies = ms.Tensor(frequencies, ms.float32)
        self.scale = float(cell.scale)
        self.cosine_first = cell.flip_sin_to_cos

    def construct(self, timesteps):
        angles = self.scale * (timesteps[:, None].astype(ms.float32) * self.frequencies)
        waves = (ops.cos(angles), ops.sin(angles)) if self.cosine_first else (ops.sin(angles), ops.cos(angles))
        return ops.cat(waves, axis=-1)


class TanhGelu(nn.Cell):
    """`tanh_gelu` as a cell. mindone's uses `ops.tanh`, whose CPU kernel has an error of up to 1e-4."""

    def construct(self, x):
        return tanh_gelu(x)


@ops.constexpr
@lru_cache(None)
def _bucket_starts(exact, count, max_distance):
    """The first distance of every bucket after the `exact` ones. Computed on the host, in float32 as in PyTorch."""
    distances = np.arange(exact, max_distance + 1)
    ratio = np.log(distances.astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    buckets = np.minimum(exact + (ratio * (count - exact)).astype(np.int64), count - 1)
    return tuple(int(distances[np.argmax(buckets >= bucket)]) for bucket in range(exact + 1, count))


def relative_position_bucket(relative_position, bidirectional=True, num_buckets=32, max_distance=128):
    """T5's bucket of every distance between tokens, int64, in the shape of `relative_position`.

    Each sign has half of the buckets. Half of those hold one distance each; the others grow by a constant factor up to
    `max_distance` (Raffel et al., arXiv 1910.10683, section 2.1). Their boundaries are computed on the host:
    MindSpore's log(2) is 0.6931470 on the CPU, which puts the distances 16, 32 and 64 one bucket too low.
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


@ms.jit_class
class AttentionProcessor:
    """Computes a mindone `Attention` cell of a UNet or VAE by `fast_ops.attention`.

    `in_float32`: Stable Diffusion 2.1 asks for it (upcast_attention), because its scores overflow in fp16. The models
    that are trained here pass no mask.
    """

    def __init__(self, in_float32):
        self.in_float32 = in_float32

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """hidden_states [B, T, d], in a VAE [B, d, h, w], attends to encoder_hidden_states [B, S, D] or to itself."""
        x = hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x)
        if x.ndim == 4:
            x = x.reshape(x.shape[:2] + (-1,)).swapaxes(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q = self.heads(attn, attn.to_q(x))
        k = self.heads(attn, attn.to_k(context))
        v = self.heads(attn, attn.to_v(context))
        if self.in_float32:
            out = attention(q.astype(ms.float32), k.astype(ms.float32), v.astype(ms.float32)).astype(q.dtype)
        else:
            out = attention(q, k, v)
        out = attn.to_out[1](attn.to_out[0](out.reshape(x.shape[:2] + (-1,))))
        if hidden_states.ndim == 4:
            out = out.swapaxes(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor if attn.rescale_output_factor != 1.0 else out

    def heads(self, attn, x):
        """[B, T, heads dim] as [B, T, heads, dim]."""
        return x.reshape(x.shape[:2] + (attn.heads, -1))


def _attention_of_heads(query, key, value, attn_mask):
    """`fast_ops.attention` of [B, heads, T, dim], with the signature that mindone's cells call, without a mask."""
    return attention(query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2)).swapaxes(1, 2)


class NeverTraining:
    """Mixed into CLIP's attention if it has no dropout: mindone's draws a mask in training, at any rate."""

    @property
    def training(self):
        return False

    @training.setter
    def training(self, value):
        pass


@lru_cache(None)
def _without_dropout(cls: type) -> type:
    return type(cls.__name__, (NeverTraining, cls), {})


def _pad_in_convolution(cell: nn.Cell) -> None:
    """Lets the convolution of a VAE's downsampling layer pad below and at the right; a pad of its own is slow."""
    conv = cell.conv
    conv.conv2d = ops.Conv2D(conv.out_channels, conv.kernel_size, pad_mode="pad", pad=(0, 1, 0, 1), stride=conv.stride)
    cell.pad = nn.Identity()


def use_fast_ops(model: nn.Cell) -> nn.Cell:
    """Replaces layers of `model` in place and returns it.

    Replaced are sinusoidal embeddings, T5's position buckets, the tanh GELU, attention and CLIP's dropout of rate 0; on
    the CPU also the padding of a VAE's convolutions, on Ascend linear layers, convolutions and layer norms.
    """
    for _, cell in list(model.cells_and_names()):
        if not ON_CPU:
            cell.__class__ = ascend_class(type(cell))
        elif type(cell).__name__ == "Downsample2D" and isinstance(cell.pad, nn.Pad):
            _pad_in_convolution(cell)
        if hasattr(cell, "math_attention_op"):
            cell.math_attention_op = _attention_of_heads
            cell.set_flash_attention_force_cast_dtype(None)  # mindone computes float32 attention in float16 otherwise
            if type(cell.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0"):
                cell.set_processor(AttentionProcessor(in_float32=bool(cell.upcast_attention)))
        if hasattr(cell, "_relative_position_bucket"):
            cell._relative_position_bucket = relative_position_bucket
        if type(cell).__name__ == "CLIPAttention" and cell.dropout == 0 and not isinstance(cell, NeverTraining):
            cell.__class__ = _without_dropout(type(cell))
        for name, child in cell.name_cells().items():
            if type(child).__name__ == "Timesteps" and not isinstance(child, Timesteps):
                setattr(cell, name, Timesteps(child))
            elif type(child).__name__ == "NewGELUActivation":
                setattr(cell, name, TanhGelu())
    return model
