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

from mindtune.cli import UserError
from mindtune.models import configs, loading, lora_layouts, lora_settings
from mindtune.models.lora_files import by_layer
from mindtune.models.named_parameters import ParameterShape
from mindtune.models.precision import Precision

INPUT_LAYER = "x_embedder"


def count_inputs(root: Path, fill: bool) -> int:
    """The inputs of the input layer, from configs: see `configs.control_inputs`."""
    return configs.control_inputs(configs.read_config(root, "vae"), fill)


def is_widened(root: Path, fill: bool) -> bool:
    """Whether the input layer gets inputs for the condition, as that of a text-to-image model does."""
    return loading.linear_layers(root, "transformer")[INPUT_LAYER][0] != count_inputs(root, fill)


def component_shapes(root: Path, fill: bool) -> list[ParameterShape]:
    """`loading.component_shapes` of the transformer with its widened input layer."""
    inputs, name = count_inputs(root, fill), f"{INPUT_LAYER}.weight"
    shapes = loading.component_shapes(root, "transformer")
    return [s._replace(shape=(s.shape[0], inputs)) if s.name == name else s for s in shapes]


def linear_layers(root: Path, fill: bool) -> dict[str, tuple[int, int]]:
    """`loading.linear_layers` of the transformer with its widened input layer."""
    layers = loading.linear_layers(root, "transformer")
    return {**layers, INPUT_LAYER: (count_inputs(root, fill), layers[INPUT_LAYER][1])}


def norm_shapes(root: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the transformer's norms that can be trained, by name."""
    return {s.name: s.shape for s in loading.component_shapes(root, "transformer") if lora_layouts.NORM.search(s.name)}


def check_input_layer(
    root: Path, fill: bool, settings: lora_settings.Settings, targets: dict[str, list[str]], initial: dict[str, dict]
) -> None:
    """Raises UserError if the input layer is widened and not adapted: then the model would never read the condition.

    `targets` and `initial` are those of `initial_lora.find_adapters`.
    """
    if not is_widened(root, fill):
        return
    if "transformer" in initial:
        require_input_layer("--lora_model_name_or_path", initial)
    elif not settings.ranks([INPUT_LAYER], targets["transformer"], in_blocks=True):
        blocks = settings.lora_blocks
        raise UserError(
            f"--lora_blocks {blocks}: leaves out {INPUT_LAYER}, which reads the condition. Add it: "
            f"--lora_blocks {INPUT_LAYER},{blocks}."
        )


def require_input_layer(flag: str, adapters: dict[str, dict]) -> None:
    """Raises UserError that names `flag` if the adapters leave out the input layer, as those of other systems do."""
    if INPUT_LAYER not in by_layer(adapters.get("transformer", {})):
        raise UserError(f"{flag}: adapts no {INPUT_LAYER}, which reads the condition. Give a Control-LoRA.")


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
