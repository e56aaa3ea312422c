"""Creates ControlNets from copies of the base model's blocks."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from mindtune.models.configs import read_config
from mindtune.models.library import mindone
from mindtune.models.loading import accepted_arguments, load_model
from mindtune.models.named_parameters import (
    ParameterShape,
    check_tensors,
    fill_parameter,
    model_parameters,
    parameter_shapes,
)
from mindtune.models.precision import resolve_precision
from mindtune.models.replaced_layers import use_fast_ops
from mindtune.models.shared_blocks import use_shared_blocks
from mindtune.models.weights import stored_tensors
from mindtune.rng import generator


def flux_controlnet(root: Path, num_layers: int, num_single_layers: int, variant: Optional[str] = None) -> nn.Cell:
    """A float32 ControlNet that starts as a copy of the transformer's embedders and first blocks.

    Its added projections start at zero, so the first prediction equals the base model's. The copies are read from the
    transformer's files, because the weights in memory may be int8. Source: Zhang et al., "Adding Conditional Control"
    (arXiv 2302.05543).
    """
    controlnet = empty_flux_controlnet(root, num_layers, num_single_layers)
    stored = stored_tensors(root, "transformer", variant)
    added = ("controlnet_x_embedder.", "controlnet_blocks.", "controlnet_single_blocks.")
    parameters = model_parameters(controlnet)
    copied = {name: parameter for name, parameter in parameters.items() if not name.startswith(added)}
    shapes = {name: tuple(parameter.shape) for name, parameter in copied.items()}
    check_tensors(root / "transformer", shapes, stored)
    for name, parameter in parameters.items():
        if name in copied:
            fill_parameter(parameter, stored[name])
        else:
            parameter.set_data(ms.Tensor(np.zeros(parameter.shape, np.float32)))
            parameter.init_mode = None
    return use_shared_blocks(use_fast_ops(controlnet))


def empty_flux_controlnet(root: Path, num_layers: int, num_single_layers: int) -> nn.Cell:
    """A ControlNet for a transformer, in evaluation mode; its float32 parameters have no memory yet."""
    config = _flux_config(root, num_layers, num_single_layers)
    with no_init_parameters():
        return mindone.diffusers.FluxControlNetModel(**config).set_train(False)


def _flux_config(root: Path, num_layers: int, num_single_layers: int) -> dict[str, Any]:
    config = accepted_arguments(mindone.diffusers.FluxControlNetModel, read_config(root, "transformer"))
    return {**config, "num_layers": num_layers, "num_single_layers": num_single_layers}


def unet_controlnet(unet: nn.Cell, seed: int) -> nn.Cell:
    """A float32 ControlNet that starts as a copy of a UNet's first half, with its added projections at zero.

    The layers that read the condition image start like PyTorch's convolutions: uniform in +-1 / sqrt(inputs), from
    `seed`. Source: Zhang et al., "Adding Conditional Control" (arXiv 2302.05543), section 3.2.
    """
    config = accepted_arguments(mindone.diffusers.ControlNetModel, dict(unet.config))
    with no_init_parameters():
        controlnet = mindone.diffusers.ControlNetModel(**config)
    copied = model_parameters(unet)
    zero = ("controlnet_cond_embedding.conv_out.", "controlnet_down_blocks.", "controlnet_mid_block.")
    parameters = model_parameters(controlnet)
    for name, parameter in parameters.items():
        if name.startswith(zero):
            value = np.zeros(parameter.shape, np.float32)
        elif name.startswith("controlnet_cond_embedding."):
            bound = 1.0 / math.sqrt(np.prod(parameters[name.rpartition(".")[0] + ".weight"].shape[1:]))
            value = generator(seed, f"initial {name}").uniform(-bound, bound, parameter.shape).astype(np.float32)
        else:
            value = copied[name].to(ms.float32).asnumpy()
        parameter.set_data(ms.Tensor(value))
        parameter.init_mode = None
    return use_fast_ops(controlnet.set_train(False))


def controlnet_shapes(root: Path, base: str, num_layers: int = 0, num_single_layers: int = 0) -> list[ParameterShape]:
    """The parameter shapes of a new ControlNet, from configs alone.

    `base` is the pipeline's component that it controls, transformer or unet. The numbers of layers are those of a FLUX
    ControlNet.
    """
    if base == "transformer":
        return _shapes("FluxControlNetModel", json.dumps(_flux_config(root, num_layers, num_single_layers)))
    config = accepted_arguments(mindone.diffusers.ControlNetModel, read_config(root, base))
    return _shapes("ControlNetModel", json.dumps(config))


@functools.cache  # a memory plan is made before a run and after it
def _shapes(cls: str, config: str) -> list[ParameterShape]:
    with no_init_parameters():
        return parameter_shapes(getattr(mindone.diffusers, cls)(**json.loads(config)))


def load_controlnet(folder: Path) -> nn.Cell:
    """An existing ControlNet in float32, to be trained on."""
    return load_model(folder.parent, folder.name, resolve_precision("no"))
