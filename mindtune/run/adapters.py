"""What an adapter adds to the memory of a run: its parameters, and what the backward pass keeps for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from mindtune.models import control_lora, lokr, lora_layouts, lora_settings
from mindtune.models.loading import component_shapes
from mindtune.models.named_parameters import ParameterShape
from mindtune.run.activations import Block

_FIRST_NAMES = {
    "double": "transformer_blocks",
    "single": "single_transformer_blocks",
    "clip": "text_model.encoder.layers",
}


class AdaptedLayer(NamedTuple):
    """The widths and the rank of a linear layer that gets an adapter."""

    outputs: int
    inputs: int
    rank: int


def base_shapes(settings: Any) -> list[ParameterShape]:
    """The parameters of the model that a run builds on, from configs. `settings` is a `memory.Settings`."""
    if settings.system == "flux_control":
        return control_lora.component_shapes(settings.root, settings.fill)
    return component_shapes(settings.root, settings.base)


def adapted_layers(settings: Any) -> dict[str, AdaptedLayer]:
    """The layers that get an adapter, by name. `settings` is a `memory.Settings`."""
    targets = lora_settings.target_names(settings.lora_layers, settings.system)
    found = _target_layers(settings, base_shapes(settings), targets, True)
    if settings.train_text_encoder:
        shapes = component_shapes(settings.root, "text_encoder")
        found.update(_target_layers(settings, shapes, lora_settings.TEXT_ENCODER_TARGETS, False))
    return found


def _target_layers(
    settings: Any, shapes: Iterable[ParameterShape], targets: list[str], in_blocks: bool
) -> dict[str, AdaptedLayer]:
    linear = {layer.name[: -len(".weight")]: layer.shape for layer in shapes if layer.linear}
    chosen = lora_settings.Settings(
        lora_rank=settings.lora_rank,
        lora_blocks=settings.lora_blocks,
        lora_rank_pattern=settings.lora_rank_pattern,
    )
    ranks = chosen.ranks(linear, targets, in_blocks)
    return {name: AdaptedLayer(*linear[name], rank) for name, rank in ranks.items()}


def trained_shapes(settings: Any) -> list[tuple[int, ...]]:
    """The shapes of what trains in the `adapted_layers`, and of the norms that --train_norm_layers trains."""
    kind, found = settings.adapter, []
    for outputs, inputs, rank in adapted_layers(settings).values():
        if kind == "lokr":
            found += lokr.shapes(outputs, inputs, rank, settings.lokr_factor).values()
        else:
            found += [(rank, inputs), (outputs, rank)] + ([(outputs,)] if kind == "dora" else [])
    norms = [shape.shape for shape in base_shapes(settings) if lora_layouts.NORM.search(shape.name)]
    return found + (norms if settings.train_norm_layers else [])


def with_adapters(
    blocks: list[Block], kind: str, layers: dict[str, AdaptedLayer], factor: int, rows: tuple[int, int, int]
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
        for name, (outputs, inputs, _) in layers.items():
            if name.startswith(prefix) and not re.search(r"\.norm\w*\.linear$", name):
                of_text = re.search(r"add_|_context", name)
                tokens = {"single": image + text, "clip": clip}.get(block.type, text if of_text else image)
                elements += tokens * (outputs if kind == "dora" else _lokr_width(outputs, inputs, factor))
        found.append(block._replace(adapter=elements))
    return found


def _lokr_width(outputs: int, inputs: int, factor: int) -> int:
    """Elements per token between the two products of a LoKr: see `fast_ops.lokr_linear`."""
    return lokr.factorise(inputs, factor)[0] * lokr.factorise(outputs, factor)[1]
