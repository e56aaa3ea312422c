"""FLUX transformers that read a condition beside the noisy latents, for a Control-LoRA.

The input layer x_embedder reads the values of the condition after those of the noisy latents. For a text-to-image
model it is widened: the weights of the further inputs start at zero, so the first prediction is that of the model.
FLUX.1-Depth and FLUX.1-Canny read the latents of one image, FLUX.1-Fill those of the masked image and the pixels of the
mask. Source of the method and of the names: diffusers' train_control_lora_flux.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from mindtune.models import configs, loading
from mindtune.models.named_parameters import ParameterShape
from mindtune.models.precision import Precision

INPUT_LAYER = "x_embedder"


def count_inputs(root: Path, fill: bool) -> int:
    """The inputs of the input layer, from configs: see `configs.control_inputs`."""
    return configs.control_inputs(configs.read_config(root, "vae"), fill)


def component_shapes(root: Path, fill: bool) -> list[ParameterShape]:
    """`loading.component_shapes` of the transformer with its widened input layer."""
    inputs, name = count_inputs(root, fill), f"{INPUT_LAYER}.weight"
    shapes = loading.component_shapes(root, "transformer")
    return [s._replace(shape=(s.shape[0], inputs)) if s.name == name else s for s in shapes]


def linear_layers(root: Path, fill: bool) -> dict[str, tuple[int, int]]:
    """`loading.linear_layers` of the transformer with its widened input layer."""
    layers = loading.linear_layers(root, "transformer")
    return {**layers, INPUT_LAYER: (count_inputs(root, fill), layers[INPUT_LAYER][1])}


def load_transformer(
    root: Path, fill: bool, precision: Precision, variant: Optional[str] = None, int8: bool = False
) -> nn.Cell:
    """The pipeline's transformer, see `loading.load_model`, with its widened input layer."""
    transformer = loading.load_model(root, "transformer", precision, variant, int8)
    widen_input_layer(transformer, count_inputs(root, fill))
    return transformer


def widen_input_layer(transformer: nn.Cell, inputs: int) -> None:
    """Gives the input layer of a transformer `inputs` inputs; the weights of those that it gets are zero."""
    layer = getattr(transformer, INPUT_LAYER)
    weight, present = layer.weight, layer.weight.shape[1]
    if present == inputs:
        return
    values = np.pad(weight.astype(ms.float32).asnumpy(), ((0, 0), (0, inputs - present)))
    layer.weight = ms.Parameter(ms.Tensor(values, weight.dtype), name=weight.name, requires_grad=False)
    layer.in_channels = inputs
    transformer.register_to_config(in_channels=inputs, out_channels=transformer.out_channels)
