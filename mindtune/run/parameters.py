"""The parameters of a run's models, frozen and trained, counted exactly from configs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mindtune.encode.estimate import ITEMSIZE
from mindtune.models import lora_layouts
from mindtune.models.controlnets import controlnet_shapes
from mindtune.models.loading import component_shapes
from mindtune.models.precision import DTYPES
from mindtune.run import adapters


class Part(NamedTuple):
    """A module in the training process: its number of parameters, their dtype, and their size in bytes."""

    name: str
    parameters: int
    dtype: str
    size: int


def frozen_part(settings: Any, name: str, int8: bool = False) -> Part:
    """A frozen component; `settings` is a `memory.Settings`, here and below. int8 weights have a scale per output."""
    itemsize = ITEMSIZE[settings.mixed_precision]
    size = count = 0
    shapes = adapters.base_shapes(settings) if name == settings.base else component_shapes(settings.root, name)
    for shape in shapes:
        if settings.train_norm_layers and lora_layouts.NORM.search(shape.name):  # one of the `trained_shapes`
            continue
        elements = math.prod(shape.shape)
        count += elements
        size += elements + 4 * shape.shape[0] if int8 and shape.linear else itemsize * elements
    dtype = str(DTYPES[settings.mixed_precision]).lower()
    return Part(name, count, f"int8, {dtype}" if int8 else dtype, size)


def trained_shapes(settings: Any) -> list[tuple[int, ...]]:
    """The shapes of the parameters that are trained."""
    root, base = settings.root, settings.base
    if settings.lora:
        return adapters.trained_shapes(settings)
    if settings.controlnet:
        found = component_shapes(settings.controlnet.parent, settings.controlnet.name)
    elif settings.flux:
        found = controlnet_shapes(root, base, settings.num_double_layers, settings.num_single_layers)
    else:
        found = controlnet_shapes(root, base)
    return [shape.shape for shape in found]


def largest_int8_weight(settings: Any) -> int:
    """The elements of the largest linear layer that is int8, 0 without int8."""
    layers = adapters.base_shapes(settings) if settings.int8 else ()
    return max((math.prod(shape.shape) for shape in layers if shape.linear), default=0)
