"""FLUX's blocks as functions of activations and weights, compiled once however many blocks there are.

mindone's blocks are cells; a graph gets a copy of every one of them, 2 seconds and 100 MB each. `bind` makes the cells call one function
a kind of block, which gets the weights as arguments and stays a function in the graph (`ms.no_inline`).

Source of the architecture: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 4, and for the single blocks
Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442), section 2.
"""

from __future__ import annotations

import inspect
from functools import lru_cache

import mindspore as ms
from mindspore import nn, ops

from mindtune.models.fast_ops import (
    ON_CPU,
    adapted_int8_linear,
    adapted_linear,
    add_gated,
    attention,
    int8_linear,
    linear,
    modulated_norm,
    rms_norm,
    rotate,
    tanh_gelu,
)

_cast = ops.Cast()


# ---- the blocks ----------------------------------------------------------------------------------


def modulation(embedded, count):
    """`count` parts [B, 1, d] of what a timestep says to a block, [B, count d]."""
    return ops.Split(2, count)(embedded.expand_dims(1))


def normed_heads(q, k, v, norm_q, norm_k):
    """[B, T, heads, dim] each, q and k in float32, of [B, T, heads dim]."""
    shape = q.shape[:2] + (-1, norm_q.shape[0])
    return rms_norm(q.reshape(shape), norm_q), rms_norm(k.reshape(shape), norm_k), v.reshape(shape)


def attend(q, k, v, rotary):
    """[B, T, heads, dim] each; [B, T, heads dim]."""
    q, k = rotate(q, rotary).astype(v.dtype), rotate(k, rotary).astype(v.dtype)
    out = attention(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)).swapaxes(1, 2)
    return out.reshape(out.shape[:2] + (-1,))


def bounded(x):
    """float16 is kept finite, as the published models do."""
    return x.clip(-65504, 65504) if x.dtype == ms.float16 else x


# (int8 weights, an adapter) -> the function of such a linear layer.
FORMS = {
    (False, False): linear, (False, True): adapted_linear, (True, False): int8_linear, (True, True): adapted_int8_linear,
}  # fmt: skip


class Block(nn.Cell):
    """`forms`: a key of FORMS for every linear layer in `names`. Chosen here: a choice within the graph cannot be looked into by
    `Recomputed`."""

    names = ()

    def __init__(self, forms):
        super().__init__()
        for name, form in zip(self.names, forms):
            setattr(self, name, FORMS[form])


class Double(Block):
    """(context [B, L, d], hidden [B, T, d]) after a block with weights of its own for each."""

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
        both, length = (
            attend(ops.cat((q_c, q), 1), ops.cat((k_c, k), 1), ops.cat((v_c, v), 1), rotary),
            context.shape[1],
        )
        context = add_gated(context, gate1_c, self.out_c(both[:, :length], out_c))
        hidden = add_gated(hidden, gate1, self.out(both[:, length:], out))
        x_c, x = modulated_norm(context, scale2_c, shift2_c), modulated_norm(hidden, scale2, shift2)
        context = add_gated(context, gate2_c, self.down_c(tanh_gelu(self.up_c(x_c, up_c)), down_c))
        hidden = add_gated(hidden, gate2, self.down(tanh_gelu(self.up(x, up)), down))
        return bounded(context), hidden


class Single(Block):
    """hidden [B, L + T, d] after a block whose attention and MLP run side by side."""

    names = ("mod", "q", "k", "v", "up", "out")

    def construct(self, hidden, temb, rotary, weights):
        mod, q, k, v, up, out, norm_q, norm_k = weights
        shift, scale, gate = modulation(self.mod(ops.silu(temb), mod), 3)
        x = modulated_norm(hidden, scale, shift)
        q, k, v = normed_heads(self.q(x, q), self.k(x, k), self.v(x, v), norm_q, norm_k)
        both = ops.cat((attend(q, k, v, rotary), tanh_gelu(self.up(x, up))), 2)
        return bounded(add_gated(hidden, gate, self.out(both, out)))


class NormOut(Block):
    """Layer norm of x [B, T, d] as the timestep says."""

    names = ("mod",)

    def construct(self, x, temb, weights):
        scale, shift = modulation(self.mod(ops.silu(temb), weights[0]), 2)
        return modulated_norm(x, scale, shift)


class Recomputed(nn.Cell):
    """A block that keeps its inputs alone for the backward pass and computes the rest again (https://arxiv.org/abs/1604.06174)."""

    def __init__(self, block):
        super().__init__()
        self.block, self.gradient = block, ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, inputs, temb, rotary, weights):
        return self.block(inputs, temb, rotary, weights)

    def bprop(self, inputs, temb, rotary, weights, out, dout):
        return self.gradient(self.block)(inputs, temb, rotary, weights, dout)


@lru_cache(None)
def shared(kind, forms, recomputes):
    """The one function that all blocks like this call; see `Block` for `forms`."""
    block = Recomputed(kind(forms)) if recomputes else kind(forms)

    @ms.no_inline
    def function(*inputs):
        return block(*inputs)

    return function


# ---- the cells that call them --------------------------------------------------------------------


def tensors(weights, frozen, dtype):
    """Parameters as tensors: of linear layers (W, b), with int8 weights their scale too, with an adapter A alpha / rank and B too; of
    norms the weight. What trains as `dtype`.

    A graph keeps a copy of a parameter that a function of it gets as a parameter, lest it be updated before the backward pass; and a
    cell with a `bprop` of its own then mixes up parameters of equal shape. A cast or a stopped gradient makes it a tensor.
    """
    return tuple(
        [
            layer_tensors(part, frozen, dtype) if isinstance(part, tuple) else tensor(part, frozen, dtype)
            for part in weights
        ]
    )


def layer_tensors(layer, frozen, dtype):
    base = tuple([tensor(part, frozen, dtype) for part in layer[0]])
    if not layer[1]:
        return base
    a, b, scale = layer[1]
    low = _cast(a, dtype)
    return base + (low if scale == 1.0 else low * scale, _cast(b, dtype))


def tensor(parameter, frozen, dtype):
    return ops.stop_gradient(parameter) if frozen else _cast(parameter, dtype)


def construct_double(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    dtype = hidden_states.dtype
    weights = tensors(self.weights[0], self.frozen, dtype), tensors(self.weights[1], self.frozen, dtype)
    return self.shared((encoder_hidden_states, hidden_states), temb, image_rotary_emb, weights)


def construct_single(self, hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    return self.shared(hidden_states, temb, image_rotary_emb, tensors(self.weights, self.frozen, hidden_states.dtype))


def construct_single_of_two(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    """mindone 0.5's single blocks take and give the two streams apart."""
    both, length = ops.cat((encoder_hidden_states, hidden_states), 1), encoder_hidden_states.shape[1]
    both = self.shared(both, temb, image_rotary_emb, tensors(self.weights, self.frozen, both.dtype))
    return both[:, :length], both[:, length:]


def construct_norm_out(self, x, conditioning_embedding):
    return self.shared(x, conditioning_embedding.astype(x.dtype), tensors(self.weights, self.frozen, x.dtype))


class RotaryTables(nn.Cell):
    """Cosines and sines of positions as `rotate` reads them, [T, heads or 1, dim] float32, in the place of a model's `pos_embed`."""

    def __init__(self, pos_embed, heads):
        super().__init__()
        self.pos_embed, self.heads = pos_embed, heads if ON_CPU else 1

    def construct(self, ids):
        cos, sin = self.pos_embed(ids)
        return self.table(cos), self.table(sin)

    def table(self, wave):
        # PyNative recomputes no block with a tuple of inputs that could have a gradient.
        return ops.stop_gradient(ops.tile(wave.astype(ms.float32).expand_dims(1), (1, self.heads, 1)))


# ---- putting them in -----------------------------------------------------------------------------


def layer_weights(layer):
    """(W, b) of a linear layer, or (W, b, scale) of one with int8 weights; and (A, B, alpha / rank) of its adapter, () if it has none
    that is switched on."""
    base = getattr(layer, "base_layer", layer)
    own = (base.weight, base.bias) + ((base.weight_scale,) if hasattr(base, "weight_scale") else ())
    if base is layer or layer.disable_adapters:
        return own, ()
    name = layer.active_adapters[0]
    return own, (layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


def double_weights(block):
    def stream(norm, attention_layers, out, mlp, norms):
        layers = (
            norm.linear,
            *(getattr(block.attn, name) for name in attention_layers),
            out,
            mlp.net[0].proj,
            mlp.net[2],
        )
        return *map(layer_weights, layers), *(getattr(block.attn, name).weight for name in norms)

    context = (
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        block.attn.to_add_out,
        block.ff_context,
        ("norm_added_q", "norm_added_k"),
    )
    hidden = ("to_q", "to_k", "to_v"), block.attn.to_out[0], block.ff, ("norm_q", "norm_k")
    return stream(block.norm1_context, *context), stream(block.norm1, *hidden)


def single_weights(block):
    attn = block.attn
    layers = (block.norm.linear, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp, block.proj_out)
    return *map(layer_weights, layers), attn.norm_q.weight, attn.norm_k.weight


def norm_out_weights(norm):
    return (layer_weights(norm.linear),)


class Bound:
    """Marks the classes that `bind` makes."""


KINDS = {
    "FluxTransformerBlock": (Double, construct_double, double_weights),
    "FluxSingleTransformerBlock": (Single, construct_single, single_weights),
    "AdaLayerNormContinuous": (NormOut, construct_norm_out, norm_out_weights),
}


def recompute(self):
    """Activations are computed again in the backward pass, not kept: in PyNative by MindSpore, in a graph by `Recomputed`."""
    if ms.get_context("mode") == ms.PYNATIVE_MODE:
        return super(type(self), self).recompute()
    self.recomputes = True
    share(self)


def share(cell):
    """Gives a bound cell the weights it holds now and the function for them."""
    kind, _, find = KINDS[type(cell).__name__]
    weights = find(cell)
    flat = weights[0] + weights[1] if kind is Double else weights
    forms = tuple((len(part[0]) == 3, bool(part[1])) for part in flat if isinstance(part, tuple))
    cell.shared = shared(kind, forms, cell.recomputes)
    cell.frozen = not any(p.requires_grad for name, p in cell.parameters_and_names() if ".lora_" not in name)
    object.__setattr__(cell, "weights", weights)  # a Cell's own would take the parameters for new ones


def bind(model: nn.Cell) -> nn.Cell:
    """Makes FLUX's blocks in `model` call the shared functions with the weights that they hold at this moment. Returns `model`.

    Call it again after layers were put in, adapters switched, or parameters frozen. With adapters that have dropout the blocks keep
    mindone's own code: one computed again would draw another mask. A model without such blocks stays as it is.
    """
    cells = [cell for _, cell in model.cells_and_names() if type(cell).__name__ in KINDS]
    if not hasattr(model, "pos_embed") or not cells:
        return model
    tables = isinstance(model.pos_embed, RotaryTables)
    if any(type(cell).__name__ == "Dropout" for name, cell in model.cells_and_names() if ".lora_dropout." in name):
        for cell in cells:
            cell.__class__ = own_class(cell)
        model.pos_embed = model.pos_embed.pos_embed if tables else model.pos_embed
        return model
    classes = {}
    for cell in cells:
        kind = type(cell).__name__
        construct = KINDS[kind][1]
        if (
            construct is construct_single
            and "encoder_hidden_states" in inspect.signature(own_class(cell).construct).parameters
        ):
            construct = construct_single_of_two
        members = {"construct": construct, "recompute": recompute}
        # One class for all blocks of a kind: MindSpore parses the functions anew for every class.
        cell.__class__ = classes.setdefault(kind, type(kind, (own_class(cell), Bound), members))
        cell.recomputes = getattr(cell, "recomputes", False)
        share(cell)
    if not tables:
        heads = next(cell.attn.heads for cell in cells if hasattr(cell, "attn"))
        model.pos_embed = RotaryTables(model.pos_embed, heads)
    return model


def own_class(cell):
    return type(cell).__bases__[0] if isinstance(cell, Bound) else type(cell)
