"""What activations and the runtime take on the CPU. Fitted to the runs of benchmarks/memory_plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindtune.run.activations import Block, with_recomputed

MB = 1 << 20
# Per block type: how many tensors of the size of its output the backward pass keeps, in graph mode and in PyNative, and
# how many tensors of attention weights. That of CLIP was not measured.
KEPT = {
    "double":    (25.0, 35.0, 1.0),
    "single":    (25.0, 35.0, 1.0),
    "clip":      (25.0, 35.0, 1.0),
    "residual":  (16.0, 16.0, 0.0),
    "attention": (16.0, 16.0, 2.5),
    "condition": (23.0, 23.0, 0.0),
}  # fmt: skip
PROCESS = 528 * MB  # the process with its libraries
# What the runtime adds. Pairs are (graph mode, PyNative).
RUNTIME = {
    "flux graph": 600 * MB,    # a graph of FLUX, and each call of a block in it
    "flux call":  6 * MB,
    "unet block": 62 * MB,     # each block in a UNet's graph
    "copies":     (6.2, 5.5),  # copies of trained parameters: shared between functions, clipped, saved
    "outputs":    (17.0, 0.0), # while a FLUX block is computed: tensors of the size of its output,
    "weights":    (4.2, 7.3),  # and of its attention weights
}  # fmt: skip


def activation_bytes(blocks: Sequence[Block], recomputed: int, itemsize: int, graph_mode: bool) -> int:
    """Bytes that the backward pass keeps if the first `recomputed` blocks keep only their inputs.

    What a block needs while it is recomputed is part of `runtime_bytes`.
    """
    size = 0.0
    for block, is_recomputed in with_recomputed(blocks, recomputed):
        in_graph, in_pynative, weights = KEPT[block.type]
        elements = block.output * (in_graph if graph_mode else in_pynative) + weights * block.attention_weights
        elements += block.adapter
        size += itemsize * (block.output if is_recomputed else elements)
    return int(size)


def runtime_bytes(
    blocks: Sequence[Block], itemsize: int, mode: int, flux: bool, trained: int, int8_elements: int
) -> int:
    """What the runtime adds, with `trained` elements that training changes.

    `int8_elements` is the size of the largest int8 weight, 0 without int8.
    """
    blocks = [block for block in blocks if block.type != "condition"]
    size: Any = PROCESS + 4 * RUNTIME["copies"][mode] * trained
    size += 3 * 4 * int8_elements  # three times in float32
    if mode == 0:
        size += (
            RUNTIME["flux graph"] + RUNTIME["flux call"] * len(blocks) if flux else RUNTIME["unet block"] * len(blocks)
        )
    if flux:
        output = max(block.output for block in blocks)
        weights = max(block.attention_weights for block in blocks)
        size += itemsize * (RUNTIME["outputs"][mode] * output + RUNTIME["weights"][mode] * weights)
    return int(size)
