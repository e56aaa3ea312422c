"""How much memory of an Ascend device a training step needs beside weights, gradients and optimizer state.

The numbers are fitted to a simulated device: MindSpore's own Ascend backend, which plans memory and launches nothing
(benchmarks/memory_plan.py --ascend). On an NPU we measured none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mindtune.run.activations import Block, recomputable, with_recomputed

# What the backward pass of a graph keeps of a FLUX block, in tensors of the size of the block's output. The weights are
# frozen, with a LoRA of the attention. The MLP has four times the size.
SINGLE = {
    "input of the norm": 1.0,
    "normed input, for the LoRA of query, key and value": 1.0,
    "query and key before their norms": 2.0,
    "query, key and value of the attention": 3.0,
    "output of the attention, and its softmax statistics": 1.25,
    "input of the GELU": 4.0,
}
DOUBLE = {
    **SINGLE,
    "input of the second norm": 1.0,
    "output of the attention, in the parts of text and image": 1.0,
    "seen in the simulation, not identified": 1.0,
}


class Kept(NamedTuple):
    """Tensors of the size of a block's output: kept of a block, of one whose weights train, and of a recomputed one."""

    frozen: float
    trained: float
    recomputed: float = 1.0  # its input


# A block with trained weights also keeps the inputs of all its linear layers, and what modulations and gates multiply.
# MindSpore's own recompute(), which the UNets use, releases only a third of a transformer block in PyNative.
GRAPH = {
    "double": Kept(sum(DOUBLE.values()), 31.0),
    "single": Kept(sum(SINGLE.values()), 26.0),
    "clip": Kept(16.0, 16.0),  # not simulated
    "residual": Kept(12.0, 12.0, 10.5),
    "attention": Kept(40.0, 40.0, 10.5),
    "condition": Kept(3.0, 3.0),
}
# PyNative also keeps what gradients need that nothing asks for, such as query and key in float32, as rotation takes
# them.
PYNATIVE = {
    "double": Kept(22.25, 55.0),
    "single": Kept(19.25, 48.0),
    "clip": Kept(24.0, 24.0),  # not simulated
    "residual": Kept(17.0, 17.0),
    "attention": Kept(52.5, 52.5, 34.0),
    "condition": Kept(3.5, 3.5),
}
ADAPTER_GRAPH, ADAPTER_PYNATIVE = 1.3, 2.0  # times what `Block.adapter` counts
PYNATIVE_INT8 = 10.0  # more per FLUX block: the inputs and outputs of int8 layers
# Gradients of activations while a FLUX block's gradient is computed.
WORKSPACE_GRAPH, WORKSPACE_PYNATIVE = 7.5, 8.5
# More if some FLUX blocks are recomputed and others are not; seen in the simulation, not identified.
WORKSPACE_PARTLY = 3.0

# Copies of the largest gradient while the optimizer updates its weight, by (graph mode, 8-bit AdamW).
COPIES = {(True, False): 1.0, (False, False): 2.0, (True, True): 3.5, (False, True): 6.5}


class Step(NamedTuple):
    """What activations depend on beside the blocks.

    The bytes per element of an activation, the sizes of the trained tensors in elements, the size of the largest int8
    weight, 0 without int8, and whether AdamW has 8-bit moments.
    """

    itemsize: int
    graph_mode: bool
    trained: list[int]
    int8: int
    eight_bit: bool = False


def activation_bytes(blocks: Sequence[Block], recomputed: int, step: Step) -> int:
    """Bytes at the peak of a step beyond weights, optimizer state and gradients, with `recomputed` blocks.

    The backward pass begins with the last block. What it has passed is free, and gradients of the weights that it has
    not reached do not exist yet: so the peak is at its start if activations are larger than gradients, otherwise at the
    end or in the optimizer, which needs copies of one gradient.
    """
    flux = any(block.type in ("double", "single") for block in blocks)
    workspace = WORKSPACE_GRAPH if step.graph_mode else WORKSPACE_PYNATIVE
    if 0 < recomputed < recomputable(blocks):
        workspace += WORKSPACE_PARTLY
    # A UNet's trained weights are cast by its layers; PyNative keeps them until the backward pass.
    casts = 0 if flux or step.graph_mode or step.itemsize == 4 else step.itemsize * sum(step.trained)
    gradients = 4 * sum(step.trained)
    reached = 0
    held = peak = 0.0
    trained_blocks = sum(block.trained for block in blocks) or 1
    for block, is_recomputed in with_recomputed(blocks, recomputed):
        kept = block_bytes(block, step)
        missing = (gradients - casts) * reached / trained_blocks
        reached += block.trained
        peak = max(peak, held + kept + (workspace * step.itemsize * block.output if flux else 0) - missing)
        held += table(step)[block.type].recomputed * step.itemsize * block.output if is_recomputed else kept
    copies = 4 * COPIES[step.graph_mode, step.eight_bit] * max(step.trained, default=0)
    return int(max(peak, copies) + step.itemsize * step.int8)


def table(step: Step) -> dict[str, Kept]:
    return GRAPH if step.graph_mode else PYNATIVE


def block_bytes(block: Block, step: Step) -> float:
    """Bytes that the backward pass keeps of a block. Without fused attention, in float32, its weights are kept too."""
    kept = table(step)[block.type]
    tensors = kept.trained if block.trained else kept.frozen
    if step.int8 and not step.graph_mode and block.type in ("double", "single") and not block.trained:
        tensors += PYNATIVE_INT8
    weights = 2.0 * block.attention_weights if step.itemsize == 4 else 0.0
    adapter = (ADAPTER_GRAPH if step.graph_mode else ADAPTER_PYNATIVE) * block.adapter
    return step.itemsize * (tensors * block.output + weights + adapter)
