"""FLUX's blocks as functions of activations and weights. Each function is compiled once for all blocks that share it.

mindone's blocks are cells, and a graph holds a copy of every cell: 2 seconds of compilation and 100 MB each.
`shared_blocks.use_shared_blocks` makes the cells call `shared_block` instead: one function per class of block, which
takes the weights as arguments and stays a function in the graph (`ms.no_inline`).

Sources of the architecture: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 4, and for
the single blocks Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442), section 2.
"""

from __future__ import annotations

from functools import lru_cache

import mindspore as ms
from mindspore import nn, ops

from mindtune.models.fast_ops import (
    adapted_int8_linear,
    adapted_linear,
    add_gated,
    attention,
    dora_int8_linear,
    dora_linear,
    int8_linear,
    linear,
    lokr_int8_linear,
    lokr_linear,
    modulated_norm,
    rms_norm,
    rotate,
    split,
    split_tokens,
    tanh_gelu,
)


def modulation(embedded, count):
    """Splits a projected timestep embedding [B, count d] into `count` modulations [B, 1, d]."""
    return split(embedded.expand_dims(1), count)


def normed_heads(q, k, v, norm_q, norm_k):
    """Splits q, k and v [B, T, heads dim] into [B, T, heads, dim] and normalises q and k."""
    shape = q.shape[:2] + (-1, norm_q.shape[0])
    return rms_norm(q.reshape(shape), norm_q), rms_norm(k.reshape(shape), norm_k), v.reshape(shape)


def attend(q, k, v, rotary):
    """Attention with rotary positions over q, k and v [B, T, heads, dim]. Returns [B, T, heads dim]."""
    q, k = rotate(q, rotary).astype(v.dtype), rotate(k, rotary).astype(v.dtype)
    out = attention(q, k, v)
    return out.reshape(out.shape[:2] + (-1,))


def clip_float16(x):
    """Keeps float16 finite, as the published models do."""
    return x.clip(-65504, 65504) if x.dtype == ms.float16 else x


# (has int8 weights, its adapter) -> the function that computes a linear layer.
LINEAR_FUNCTIONS = {
    (False, ""): linear,
    (False, "lora"): adapted_linear,
    (False, "dora"): dora_linear,
    (False, "lokr"): lokr_linear,
    (True, ""): int8_linear,
    (True, "lora"): adapted_int8_linear,
    (True, "dora"): dora_int8_linear,
    (True, "lokr"): lokr_int8_linear,
}


class Block(nn.Cell):
    """Base class of the block functions. `layer_types` holds a key of LINEAR_FUNCTIONS per linear layer in `names`.

    The functions are chosen here and not in the graph: `RecomputedBlock` cannot differentiate a choice within the
    graph.
    """

    names = ()

    def __init__(self, layer_types):
        super().__init__()
        for name, layer_type in zip(self.names, layer_types):
            setattr(self, name, LINEAR_FUNCTIONS[layer_type])


class DoubleBlock(Block):
    """A block that has separate weights for text and image: (context [B, L, d], hidden [B, T, d]) in and out."""

    names = ("mod_c", "q_c", "k_c", "v_c", "out_c", "up_c", "down_c", "mod", "q", "k", "v", "out", "up", "down")

    def construct(self, inputs, temb, rotary, weights):
        context, hidden = inputs
        mod_c, q_c, k_c, v_c, out_c, up_c, down_c, norm_q_c, norm_k_c = weights[0]
        mod, q, k, v, out, up, down, norm_q, norm_k = weights[1]
        shift1_c, scale1_c, gate1_c, shift2_c, scale2_c, gate2_c = modulation(self.mod_c(ops.silu(temb), mod_c), 6)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.mod(ops.silu(temb), mod), 6)
        x_c, x = modulated_norm(context, scale1_c, shift1_c), modulated_norm(hidden, scale1, shift1)
        q_c, k_c, v_c = normed_heads(self.q_c(x_c, q_c), self.k_c(x_c, k_c), self.v_c(x_c, v_c), norm_q_c, norm_k_c)
        q, k, v = normed_heads(self.q(x, q), self.k(x, k), self.v(x, v), norm_q, norm_k)
        attended = attend(ops.cat((q_c, q), 1), ops.cat((k_c, k), 1), ops.cat((v_c, v), 1), rotary)
        attended_c, attended = split_tokens(attended, context.shape[1])
        context = add_gated(context, gate1_c, self.out_c(attended_c, out_c))
        hidden = add_gated(hidden, gate1, self.out(attended, out))
        x_c, x = modulated_norm(context, scale2_c, shift2_c), modulated_norm(hidden, scale2, shift2)
        context = add_gated(context, gate2_c, self.down_c(tanh_gelu(self.up_c(x_c, up_c)), down_c))
        hidden = add_gated(hidden, gate2, self.down(tanh_gelu(self.up(x, up)), down))
        return clip_float16(context), hidden


class SingleBlock(Block):
    """A block over text and image tokens together, hidden [B, L + T, d]; attention and MLP run in parallel."""

    names = ("mod", "q", "k", "v", "up", "out")

    def construct(self, hidden, temb, rotary, weights):
        mod, q, k, v, up, out, norm_q, norm_k = weights
        shift, scale, gate = modulation(self.mod(ops.silu(temb), mod), 3)
        x = modulated_norm(hidden, scale, shift)
        q, k, v = normed_heads(self.q(x, q), self.k(x, k), self.v(x, v), norm_q, norm_k)
        both = ops.cat((attend(q, k, v, rotary), tanh_gelu(self.up(x, up))), 2)
        return clip_float16(add_gated(hidden, gate, self.out(both, out)))


class OutputNorm(Block):
    """The last layer norm, x [B, T, d], modulated by the timestep."""

    names = ("mod",)

    def construct(self, x, temb, weights):
        scale, shift = modulation(self.mod(ops.silu(temb), weights[0]), 2)
        return modulated_norm(x, scale, shift)


class RecomputedBlock(nn.Cell):
    """A block that keeps only its inputs for the backward pass and recomputes the rest (arXiv 1604.06174)."""

    def __init__(self, block):
        super().__init__()
        self.block, self.gradient = block, ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, inputs, temb, rotary, weights):
        return self.block(inputs, temb, rotary, weights)

    def bprop(self, inputs, temb, rotary, weights, out, dout):
        return self.gradient(self.block)(inputs, temb, rotary, weights, dout)


@lru_cache(None)
def shared_block(block_class, layer_types, recomputes):
    """The one function that all blocks with these properties call; see `Block` for `layer_types`."""
    block = RecomputedBlock(block_class(layer_types)) if recomputes else block_class(layer_types)

    @ms.no_inline
    def function(*inputs):
        return block(*inputs)

    return function
