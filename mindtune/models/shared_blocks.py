"""Makes the block cells of a FLUX model call the shared functions of `flux_blocks` with their own weights."""

from __future__ import annotations

import inspect
import re

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.models.fast_ops import look_up, rotary_table, split, split_tokens
from mindtune.models.flux_blocks import DoubleBlock, OutputNorm, SingleBlock, shared_block
from mindtune.models.flux_transformer import construct_transformer
from mindtune.models.lora_layouts import NORM

ADAPTER = re.compile(r"\.(lora|lokr)_")  # in the name of an adapter's parameter
POSITIONS = 4096  # images of 65,536 pixels

_cast = ops.Cast()


# ---- weights as arguments ------------------------------------------------------------------------


def as_tensors(weights, frozen, dtype):
    """Turns a block's parameters into tensors; what trains is cast to `dtype`. `frozen`: (linear layers, norms).

    A linear layer becomes (W, b), with int8 weights (codes, b, scales), each followed by what its adapter has: A times
    alpha / rank and B, for a DoRA also the magnitudes and the squared norms of W, or the factors of a LoKr, w1 times
    its scale. A norm becomes its weight.

    A graph copies a parameter that is passed to a function as a parameter, in case it is updated before the backward
    pass, and a cell that defines `bprop` then confuses parameters of equal shape. A cast or stop_gradient makes it a
    tensor.
    """
    return tuple(
        [
            layer_tensors(weight, frozen[0], dtype) if isinstance(weight, tuple) else _tensor(weight, frozen[1], dtype)
            for weight in weights
        ]
    )


def layer_tensors(layer, frozen, dtype):
    """`as_tensors` for one linear layer, from its `layer_weights`."""
    base = tuple([_tensor(parameter, frozen, dtype) for parameter in layer[0]])
    if not layer[1]:
        return base
    _, scale, factors, norms = layer[1]
    first = _cast(factors[0], dtype)
    base = base + (first if scale == 1.0 else first * scale, *[_cast(factor, dtype) for factor in factors[1:]])
    return base + (_cast(norms[0], ms.float32), ops.stop_gradient(norms[1])) if norms else base


def _tensor(parameter, frozen, dtype):
    return ops.stop_gradient(parameter) if frozen else _cast(parameter, dtype)


# ---- what the cells compute ----------------------------------------------------------------------


def construct_double(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    dtype = hidden_states.dtype
    weights = as_tensors(self.weights[0], self.frozen, dtype), as_tensors(self.weights[1], self.frozen, dtype)
    return self.shared_block((encoder_hidden_states, hidden_states), temb, image_rotary_emb, weights)


def construct_single(self, hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    weights = as_tensors(self.weights, self.frozen, hidden_states.dtype)
    return self.shared_block(hidden_states, temb, image_rotary_emb, weights)


def construct_single_from_two(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    """mindone 0.5's single blocks take and return text and image tokens separately."""
    both = ops.cat((encoder_hidden_states, hidden_states), 1)
    both = self.shared_block(both, temb, image_rotary_emb, as_tensors(self.weights, self.frozen, both.dtype))
    return split_tokens(both, encoder_hidden_states.shape[1])


def construct_output_norm(self, x, conditioning_embedding):
    weights = as_tensors(self.weights, self.frozen, x.dtype)
    return self.shared_block(x, conditioning_embedding.astype(x.dtype), weights)


class RotaryTables(nn.Cell):
    """Cosines and sines of positions `ids` [T, axes], in the shape that `fast_ops.rotate` takes.

    Replaces a model's `pos_embed`, which computes them in float64 on the device. Here they are computed once on the
    host, for every position of every axis, and looked up. Positions are integers below POSITIONS.
    """

    def __init__(self, pos_embed, heads):
        super().__init__()
        self.pos_embed, self.heads = pos_embed, heads
        self.waves = tuple([_waves(dim, pos_embed.theta) for dim in pos_embed.axes_dim])

    def construct(self, ids):
        columns = split(ids.astype(ms.int32), len(self.waves))
        rows = [look_up(waves, column) for waves, column in zip(self.waves, columns)]
        return self.table([row[0] for row in rows]), self.table([row[1] for row in rows])

    def table(self, waves):
        # PyNative does not recompute a block that gets a tuple of inputs which may have a gradient.
        return ops.stop_gradient(rotary_table(ops.cat(waves, 1), self.heads))


def _waves(dim, theta):
    """(cosines, sines) of an axis, float32 [POSITIONS, dim]: each frequency theta^(-2i / dim) twice."""
    frequencies = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
    angles = np.repeat(np.outer(np.arange(POSITIONS), frequencies), 2, axis=1)
    return ms.Tensor(np.cos(angles), ms.float32), ms.Tensor(np.sin(angles), ms.float32)


# ---- the weights of the cells --------------------------------------------------------------------


def layer_weights(layer):
    """The parameters of a linear layer and those of its adapter.

    The first item is (W, b), or (codes, b, scales) for int8 weights. The second is () if there is no adapter or it is
    disabled, otherwise (kind, scale, factors, norms). The factors are (A, B), or (w1, w2) or (w1, w2_a, w2_b). The
    norms are (m, squared norms of the rows of W) for a DoRA, otherwise ().
    """
    base = getattr(layer, "base_layer", layer)
    weights = (base.weight, base.bias) + ((base.weight_scale,) if hasattr(base, "weight_scale") else ())
    if getattr(layer, "disable_adapters", True):
        return weights, ()
    if hasattr(layer, "lokr_w1"):
        second = (layer.lokr_w2,) if hasattr(layer, "lokr_w2") else (layer.lokr_w2_a, layer.lokr_w2_b)
        return weights, ("lokr", layer.lokr_scale, (layer.lokr_w1, *second), ())
    name = layer.active_adapters[0]
    factors, scale = (layer.lora_A[name].weight, layer.lora_B[name].weight), float(layer.scaling[name])
    if hasattr(layer, "lora_magnitude_vector"):
        return weights, ("dora", scale, factors, (layer.lora_magnitude_vector, layer.lora_squared_norms))
    return weights, ("lora", scale, factors, ())


def layer_type(weights):
    """The key in `LINEAR_FUNCTIONS` of a layer with these `layer_weights`."""
    return len(weights[0]) == 3, weights[1][0] if weights[1] else ""


def double_block_weights(block):
    """(weights of the text stream, weights of the image stream), each in the order that `DoubleBlock` unpacks."""
    attention = block.attn
    context = (
        block.norm1_context.linear,
        attention.add_q_proj,
        attention.add_k_proj,
        attention.add_v_proj,
        attention.to_add_out,
        block.ff_context.net[0].proj,
        block.ff_context.net[2],
    )
    hidden = (
        block.norm1.linear,
        attention.to_q,
        attention.to_k,
        attention.to_v,
        attention.to_out[0],
        block.ff.net[0].proj,
        block.ff.net[2],
    )
    return (
        (*map(layer_weights, context), attention.norm_added_q.weight, attention.norm_added_k.weight),
        (*map(layer_weights, hidden), attention.norm_q.weight, attention.norm_k.weight),
    )


def single_block_weights(block):
    attention = block.attn
    layers = (block.norm.linear, attention.to_q, attention.to_k, attention.to_v, block.proj_mlp, block.proj_out)
    return *map(layer_weights, layers), attention.norm_q.weight, attention.norm_k.weight


def output_norm_weights(norm):
    return (layer_weights(norm.linear),)


# ---- putting them in -----------------------------------------------------------------------------


class SharedBlockCell:
    """Marks the classes that `use_shared_blocks` makes."""


# mindone's class -> its block function, the construct that calls it, and the function that collects its weights.
BLOCK_TYPES = {
    "FluxTransformerBlock": (DoubleBlock, construct_double, double_block_weights),
    "FluxSingleTransformerBlock": (SingleBlock, construct_single, single_block_weights),
    "AdaLayerNormContinuous": (OutputNorm, construct_output_norm, output_norm_weights),
}


def use_shared_blocks(model: nn.Cell) -> nn.Cell:
    """Makes FLUX's blocks in `model` call the shared functions with their current weights. Returns `model`.

    Call it again after adding layers, switching adapters, or freezing parameters. With dropout in an adapter the blocks
    keep mindone's own code: recomputation would draw another mask. A model without such blocks stays as it is.
    """
    cells = [cell for _, cell in model.cells_and_names() if type(cell).__name__ in BLOCK_TYPES]
    if not hasattr(model, "pos_embed") or not cells:
        return model
    if any(type(cell).__name__ == "Dropout" for name, cell in model.cells_and_names() if ".lora_dropout." in name):
        return _restore(model, cells)
    classes = {}
    if _adds_to_slices(model):
        model.__class__ = _shared_class(model, {"construct": construct_transformer})
    for cell in cells:
        name = type(cell).__name__
        members = {"construct": _construct_of(cell), "recompute": recompute}
        # One class for all blocks of a type: MindSpore parses the functions again for every class.
        cell.__class__ = classes.setdefault(name, _shared_class(cell, members))
        cell.recomputes = getattr(cell, "recomputes", False)
        _update_weights(cell)
    if not isinstance(model.pos_embed, RotaryTables):
        heads = next(cell.attn.heads for cell in cells if hasattr(cell, "attn"))
        model.pos_embed = RotaryTables(model.pos_embed, heads)
    return model


def _restore(model: nn.Cell, cells: list[nn.Cell]) -> nn.Cell:
    """Gives the model and its blocks mindone's own code again."""
    for cell in (model, *cells):
        cell.__class__ = _original_class(cell)
    if isinstance(model.pos_embed, RotaryTables):
        model.pos_embed = model.pos_embed.pos_embed
    return model


def _original_class(cell: nn.Cell) -> type:
    return type(cell).__bases__[0] if isinstance(cell, SharedBlockCell) else type(cell)


def _shared_class(cell: nn.Cell, members: dict) -> type:
    return type(type(cell).__name__, (_original_class(cell), SharedBlockCell), members)


def _construct_of(cell: nn.Cell):
    construct = BLOCK_TYPES[type(cell).__name__][1]
    return construct_single_from_two if construct is construct_single and _takes_two(cell) else construct


def _takes_two(block: nn.Cell) -> bool:
    """True if a single block takes text and image tokens separately, as in mindone 0.5."""
    return "encoder_hidden_states" in inspect.signature(_original_class(block).construct).parameters


def _adds_to_slices(model: nn.Cell) -> bool:
    """True for the transformer of mindone 0.3; see `construct_transformer`."""
    blocks = getattr(model, "single_transformer_blocks", ())
    return type(model).__name__ == "FluxTransformer2DModel" and len(blocks) > 0 and not _takes_two(blocks[0])


def _update_weights(cell: nn.Cell) -> None:
    """Gives a cell its current weights and the function for them."""
    block_class, _, collect_weights = BLOCK_TYPES[type(cell).__name__]
    weights = collect_weights(cell)
    flat = weights[0] + weights[1] if block_class is DoubleBlock else weights
    layer_types = tuple(layer_type(layer) for layer in flat if isinstance(layer, tuple))
    cell.shared_block = shared_block(block_class, layer_types, cell.recomputes)
    own = [name for name, p in cell.parameters_and_names() if p.requires_grad and not ADAPTER.search(name)]
    cell.frozen = not any(not NORM.search(f".{name}") for name in own), not own
    object.__setattr__(cell, "weights", weights)  # Cell.__setattr__ would register the parameters a second time


def recompute(self):
    """Recomputes activations in the backward pass: in PyNative by MindSpore, in a graph by `RecomputedBlock`."""
    if ms.get_context("mode") == ms.PYNATIVE_MODE:
        return super(type(self), self).recompute()
    self.recomputes = True
    _update_weights(self)
