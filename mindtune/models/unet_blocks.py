"""Blocks of Stable Diffusion's UNets that are recomputed in a graph: functions of activations and weights.

In a graph on the CPU, MindSpore's `recompute()` computes a block again and frees nothing. Here a block is a cell with a
backward pass of its own, as FLUX's are (`flux_blocks.RecomputedBlock`): it keeps its inputs and its weights alone. The
weights are arguments, because such a cell must return their gradients.

Sources of the architecture: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
2112.10752), appendix B, and for the gated MLP Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import auto_generate

from mindtune.models.fast_ops import attention, linear, split

_cast = ops.Cast()
_group_norm = auto_generate.GroupNorm()
_bias_add = ops.BiasAdd()
_matmul_transposed_b = ops.MatMul(transpose_b=True)


# ---- layers: primitives alone, see fast_ops ------------------------------------------------------


def project(x, layer):
    """x [..., in] times the transpose of W [out, in]. `layer` is (W,)."""
    out = _matmul_transposed_b(x.reshape((-1, x.shape[-1])), _cast(layer[0], x.dtype))
    return out.reshape(x.shape[:-1] + (out.shape[-1],))


def convolve(x, layer):
    """x [B, in, h, w] convolved with W [out, in, side, side], side odd, padded to h and w, plus b [out]."""
    weight, side = _cast(layer[0], x.dtype), layer[0].shape[2]
    convolution = ops.Conv2D(weight.shape[0], side, pad_mode="pad", pad=side // 2)
    return _bias_add(convolution(x, weight), _cast(layer[1], x.dtype))


def group_norm(x, layer, groups, eps):
    """Group norm (arXiv 1803.08494) of x [B, C, h, w]. `layer` is (scale, shift), [C] each."""
    return _group_norm(x, groups, _cast(layer[0], x.dtype), _cast(layer[1], x.dtype), eps)[0]


def layer_norm(x, layer, eps):
    """Layer norm over the last axis of x [B, T, d]. `layer` is (scale, shift), [d] each."""
    return ops.LayerNorm(-1, -1, eps)(x, _cast(layer[0], x.dtype), _cast(layer[1], x.dtype))[0]


def gelu(x):
    """x times the distribution function of the normal distribution at x (https://arxiv.org/abs/1606.08415).

    In the order of `ops.gelu`, so that recomputing changes no bit.
    """
    return x * (ops.erf(x / 2.0**0.5) + 1.0) * 0.5


# ---- blocks --------------------------------------------------------------------------------------


class ResidualBlock(nn.Cell):
    """(x [B, C, h, w], timestep embedding [B, D], weights) -> [B, C', h, w]. `norms`: groups and eps of both norms."""

    def __init__(self, norms, shortcut):
        super().__init__()
        (self.groups1, self.eps1), (self.groups2, self.eps2) = norms
        # Chosen here: a choice within the graph cannot be differentiated in a backward pass.
        self.skip = self.convolved if shortcut else self.unchanged

    def construct(self, x, temb, weights):
        norm1, conv1, time, norm2, conv2 = weights[:5]
        hidden = convolve(ops.silu(group_norm(x, norm1, self.groups1, self.eps1)), conv1)
        hidden = hidden + linear(ops.silu(temb), time).expand_dims(-1).expand_dims(-1)
        hidden = convolve(ops.silu(group_norm(hidden, norm2, self.groups2, self.eps2)), conv2)
        return self.skip(x, weights) + hidden

    def unchanged(self, x, weights):
        return x

    def convolved(self, x, weights):
        return convolve(x, weights[5])


class TransformerBlock(nn.Cell):
    """(x [B, T, d], text [B, S, D], weights) -> [B, T, d]. `in_float32`: attention is computed in float32."""

    def __init__(self, heads, in_float32, eps):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.attention = self.wide_attention if in_float32 else self.plain_attention

    def construct(self, x, text, weights):
        norm1, attn1, norm2, attn2, norm3, up, down = weights
        normed = layer_norm(x, norm1, self.eps)
        x = self.attend(normed, normed, attn1) + x
        x = self.attend(layer_norm(x, norm2, self.eps), text, attn2) + x
        hidden, gate = split(linear(layer_norm(x, norm3, self.eps), up), 2)
        return linear(hidden * gelu(gate), down) + x

    def attend(self, x, context, layers):
        q, k, v, out = layers
        attended = self.attention(
            self.split_heads(project(x, q)),
            self.split_heads(project(context, k)),
            self.split_heads(project(context, v)),
        )
        return linear(attended.reshape(x.shape[:2] + (-1,)), out)

    def split_heads(self, x):
        return x.reshape(x.shape[:2] + (self.heads, -1))

    def plain_attention(self, q, k, v):
        return attention(q, k, v)

    def wide_attention(self, q, k, v):
        wide = attention(_cast(q, ms.float32), _cast(k, ms.float32), _cast(v, ms.float32))
        return _cast(wide, q.dtype)


class RecomputedBlock(nn.Cell):
    """A block with trained weights that keeps only its inputs for the backward pass (arXiv 1604.06174)."""

    def __init__(self, block):
        super().__init__()
        self.block, self.gradient = block, ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x, given, weights):
        return self.block(x, given, weights)

    def bprop(self, x, given, weights, out, dout):
        return self.gradient(self.block)(x, given, weights, dout)


class FrozenBlock(nn.Cell):
    """A block whose weights are constants."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def construct(self, x, given, weights):
        return self.block(x, given, ops.stop_gradient(weights))


class RecomputedFrozenBlock(RecomputedBlock):
    """`RecomputedBlock` without gradients of its weights, which must come out of a stop_gradient."""

    def __init__(self, block):
        super().__init__(FrozenBlock(block))

    def bprop(self, x, given, weights, out, dout):
        gradients = self.gradient(self.block)(x, given, weights, dout)
        return gradients[0], gradients[1], weights  # anything of the right shapes: nobody reads it


@lru_cache(None)
def recomputed_block(block_class, settings, frozen):
    """The one function that all recomputed blocks with these properties call. It is compiled once for equal shapes."""
    block = (RecomputedFrozenBlock if frozen else RecomputedBlock)(block_class(*settings))

    @ms.no_inline
    def function(x, given, weights):
        return block(x, given, weights)

    return function


# ---- mindone's cells -----------------------------------------------------------------------------


def as_tensors(weights, frozen, dtype):
    """`shared_blocks.as_tensors` for tuples of weights of any depth."""
    return tuple(
        [
            as_tensors(weight, frozen, dtype)
            if isinstance(weight, tuple)
            else (ops.stop_gradient(weight) if frozen else _cast(weight, dtype))
            for weight in weights
        ]
    )


def construct_residual(self, input_tensor, temb):
    dtype = input_tensor.dtype
    return self.recomputed_block(input_tensor, _cast(temb, dtype), as_tensors(self.weights, self.frozen, dtype))


def construct_transformer(self, hidden_states, attention_mask=None, encoder_hidden_states=None, *_, **__):
    dtype = hidden_states.dtype
    text = _cast(encoder_hidden_states, dtype)
    return self.recomputed_block(hidden_states, text, as_tensors(self.weights, self.frozen, dtype))


def _pair(layer):
    return layer.weight, layer.bias


def residual_weights(cell):
    """The parameters in the order that `ResidualBlock` unpacks."""
    weights = tuple(map(_pair, (cell.norm1, cell.conv1, cell.time_emb_proj, cell.norm2, cell.conv2)))
    return weights if cell.conv_shortcut is None else (*weights, _pair(cell.conv_shortcut))


def residual_settings(cell):
    norms = tuple((norm.num_groups, norm.eps) for norm in (cell.norm1, cell.norm2))
    return norms, cell.conv_shortcut is not None


def is_usual_residual(cell):
    """True for the residual blocks of Stable Diffusion. Others stay with MindSpore's `recompute()`."""
    return (
        cell.time_embedding_norm == "default"
        and cell.time_emb_proj is not None
        and not cell.skip_time_act
        and cell.upsample is None
        and cell.downsample is None
        and cell.output_scale_factor == 1.0
        and not cell.dropout.p
        and type(cell.nonlinearity).__name__ == "SiLU"
    )


def transformer_weights(cell):
    """The parameters in the order that `TransformerBlock` unpacks."""
    attention1, attention2 = (
        ((layer.to_q.weight,), (layer.to_k.weight,), (layer.to_v.weight,), _pair(layer.to_out[0]))
        for layer in (cell.attn1, cell.attn2)
    )
    up, down = cell.ff.net[0].proj, cell.ff.net[2]
    return _pair(cell.norm1), attention1, _pair(cell.norm2), attention2, _pair(cell.norm3), _pair(up), _pair(down)


def transformer_settings(cell):
    return cell.attn1.heads, bool(cell.attn1.upcast_attention), cell.norm1.eps


def is_usual_transformer(cell):
    """True for the transformer blocks of Stable Diffusion. Others stay with MindSpore's `recompute()`."""
    return (
        cell.norm_type == "layer_norm"
        and cell.activation_fn == "geglu"
        and cell.cross_attention_dim is not None
        and not (cell.only_cross_attention or cell.double_self_attention or cell.attention_bias or cell.dropout)
        and cell.norm_elementwise_affine
        and cell.pos_embed is None
        and cell._chunk_size is None
        and not hasattr(cell, "fuser")
    )


class CellType(NamedTuple):
    """How a class of mindone becomes a recomputed block: functions of a cell, and the `construct` that it gets."""

    block: type
    construct: Callable
    weights: Callable
    settings: Callable
    is_usual: Callable


CELL_TYPES = {
    "ResnetBlock2D": CellType(
        ResidualBlock, construct_residual, residual_weights, residual_settings, is_usual_residual
    ),
    "BasicTransformerBlock": CellType(
        TransformerBlock, construct_transformer, transformer_weights, transformer_settings, is_usual_transformer
    ),
}


@lru_cache(None)
def _recomputed_class(cls: type) -> type:
    return type(cls.__name__, (cls,), {"construct": CELL_TYPES[cls.__name__].construct})


def use_recomputed_block(cell: nn.Cell) -> bool:
    """Makes a block of a UNet recompute itself in a graph. Returns False, and changes nothing, if it cannot be done.

    Call it after freezing: blocks without a trained weight compute no gradients of weights.
    """
    cell_type = CELL_TYPES.get(type(cell).__name__)
    if cell_type is None or not cell_type.is_usual(cell):
        return False
    cell.frozen = not any(parameter.requires_grad for parameter in cell.get_parameters())
    cell.recomputed_block = recomputed_block(cell_type.block, cell_type.settings(cell), cell.frozen)
    object.__setattr__(cell, "weights", cell_type.weights(cell))  # Cell.__setattr__ would register them again
    cell.__class__ = _recomputed_class(type(cell))
    return True
