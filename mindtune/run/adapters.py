"""What an adapter adds to the memory of a run: its parameters, and what the backward pass keeps for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from mindtune.models import lokr
from mindtune.models.named_parameters import ParameterShape
from mindtune.run.activations import Block

_FIRST_NAMES = {
    "double": "transformer_blocks",
    "single": "single_transformer_blocks",
    "clip": "text_model.encoder.layers",
}


def target_layers(shapes: Iterable[ParameterShape], targets: list[str]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer whose name ends in a target, by name."""
    return {
        layer.name[: -len(".weight")]: layer.shape
        for layer in shapes
        if layer.linear and any(f".{layer.name}".endswith(f".{target}.weight") for target in targets)
    }


def trained_shapes(kind: str, layers: Iterable[tuple[int, int]], rank: int, factor: int) -> list[tuple[int, ...]]:
    """The shapes of what trains in layers of these (outputs, inputs)."""
    found: list[tuple[int, ...]] = []
    for outputs, inputs in layers:
        if kind == "lokr":
            found += lokr.shapes(outputs, inputs, rank, factor).values()
        else:
            found += [(rank, inputs), (outputs, rank)] + ([(outputs,)] if kind == "dora" else [])
    return found


def with_adapters(
    blocks: list[Block], kind: str, layers: dict[str, tuple[int, int]], factor: int, rows: tuple[int, int, int]
) -> list[Block]:
    """FLUX's and CLIP's `blocks` with what a DoRA or LoKr in their `layers` keeps beyond a LoRA.

    A DoRA keeps the output of a layer before it is scaled, and a LoKr the input of w1. `rows` are the tokens of the
    image, the text and CLIP in a batch. Layers that get one row per image are not counted.
    """
    if kind == "lora":
        return blocks
    image, text, clip = rows
    found, numbers = [], Counter()
    for block in blocks:
        prefix, elements = f"{_FIRST_NAMES[block.type]}.{numbers[block.type]}.", 0
        numbers[block.type] += 1
        for name, (outputs, inputs) in layers.items():
            if name.startswith(prefix) and not re.search(r"\.norm\w*\.linear$", name):
                of_text = re.search(r"add_|_context", name)
                tokens = {"single": image + text, "clip": clip}.get(block.type, text if of_text else image)
                elements += tokens * (outputs if kind == "dora" else _lokr_width(outputs, inputs, factor))
        found.append(block._replace(adapter=elements))
    return found


def _lokr_width(outputs: int, inputs: int, factor: int) -> int:
    """Elements per token between the two products of a LoKr: see `fast_ops.lokr_linear`."""
    return lokr.factorise(inputs, factor)[0] * lokr.factorise(outputs, factor)[1]
