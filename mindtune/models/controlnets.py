"""New ControlNets, made of copies of the base model's blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from mindtune.models.configs import read_config
from mindtune.models.fast_ops import use_operators
from mindtune.models.flux_blocks import bind
from mindtune.models.library import mindone
from mindtune.models.loading import (
    Shape,
    check_fit,
    fill_parameter,
    known_arguments,
    model_parameters,
    parameter_shapes,
)
from mindtune.models.weights import stored_tensors
from mindtune.rng import generator


def flux_controlnet(root: Path, num_layers: int, num_single_layers: int, variant: Optional[str] = None) -> nn.Cell:
    """A ControlNet that starts as a copy of the transformer's embedders and first blocks, float32, its added projections zero.

    The copies are read from the transformer's files: what is in memory may be int8. Zero outputs make the first prediction the base
    model's own. Source: Zhang et al., "Adding Conditional Control" (arXiv 2302.05543).
    """
    controlnet, stored = (
        empty_flux_controlnet(root, num_layers, num_single_layers),
        stored_tensors(root, "transformer", variant),
    )
    added = ("controlnet_x_embedder.", "controlnet_blocks.", "controlnet_single_blocks.")
    parameters = model_parameters(controlnet)
    copied = {name: parameter for name, parameter in parameters.items() if not name.startswith(added)}
    check_fit(root / "transformer", copied, stored)
    for name, parameter in parameters.items():
        if name in copied:
            fill_parameter(parameter, stored[name])
        else:
            parameter.set_data(ms.Tensor(np.zeros(parameter.shape, np.float32)))
            parameter.init_mode = None
    return bind(use_operators(controlnet))


def empty_flux_controlnet(root: Path, num_layers: int, num_single_layers: int) -> nn.Cell:
    """A new ControlNet of a transformer's width in evaluation mode, with float32 parameters that have no memory yet."""
    config = known_arguments(mindone.diffusers.FluxControlNetModel, read_config(root, "transformer"))
    config.update(num_layers=num_layers, num_single_layers=num_single_layers)
    with no_init_parameters():
        return mindone.diffusers.FluxControlNetModel(**config).set_train(False)


def unet_controlnet(unet: nn.Cell, seed: int) -> nn.Cell:
    """A ControlNet that starts as a copy of a UNet's first half, float32, its added projections zero.

    Its layers that read the condition picture start as PyTorch's convolutions do, uniform in +-1 / sqrt(inputs), from `seed`.
    Source: Zhang et al., "Adding Conditional Control" (arXiv 2302.05543), section 3.2.
    """
    controlnet = mindone.diffusers.ControlNetModel(
        **known_arguments(mindone.diffusers.ControlNetModel, dict(unet.config))
    )
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
    return use_operators(controlnet.set_train(False))


def controlnet_shapes(root: Path, base: str, num_layers: int = 0, num_single_layers: int = 0) -> list[Shape]:
    """The same of a new ControlNet for the pipeline's `base`, transformer or unet; blocks are those of a FLUX ControlNet."""
    if base == "transformer":
        return parameter_shapes(empty_flux_controlnet(root, num_layers, num_single_layers))
    with no_init_parameters():
        return parameter_shapes(
            mindone.diffusers.ControlNetModel(
                **known_arguments(mindone.diffusers.ControlNetModel, read_config(root, base))
            )
        )


def recompute_unet(model: nn.Cell) -> None:
    """Activations of a UNet's or ControlNet's residual and transformer blocks are computed again in the backward pass, not kept.

    mindone's own switch leaves out the first residual block of every level and all attention.
    """
    for _, cell in model.cells_and_names():
        if type(cell).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            cell.recompute()
