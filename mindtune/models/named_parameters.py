"""A model's parameters by their names in weight files: their shapes, checking them against files, and filling them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import nn

from mindtune.cli import UserError, indented_list
from mindtune.models.fast_ops import ON_CPU
from mindtune.models.int8 import quantise
from mindtune.models.precision import LINEAR_LAYERS, NUMPY_DTYPES
from mindtune.models.weights import FILE_DTYPES, StoredTensor


class ParameterShape(NamedTuple):
    """A parameter's name in the weight files, its shape, and whether it is the weight of a linear layer."""

    name: str
    shape: tuple[int, ...]
    linear: bool


def hf_name(name: str) -> str:
    """The Hugging Face name of a MindSpore parameter. mindone's save_pretrained would write MindSpore's names."""
    for mindspore_name, file_name in ((".gamma", ".weight"), (".beta", ".bias"), (".embedding_table", ".weight")):
        if name.endswith(mindspore_name):
            return name[: -len(mindspore_name)] + file_name
    return name


def model_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """Every parameter by its name in the weight files."""
    return {hf_name(name): parameter for name, parameter in model.parameters_and_names()}


def parameter_shapes(model: nn.Cell) -> list[ParameterShape]:
    """The shape of every parameter of `model`."""
    linear = {f"{name}.weight" for name, cell in model.cells_and_names() if isinstance(cell, LINEAR_LAYERS)}
    return [
        ParameterShape(name, tuple(parameter.shape), name in linear)
        for name, parameter in model_parameters(model).items()
    ]


def check_tensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor], extras: Iterable[str] = ()
) -> None:
    """Raises UserError unless every parameter of `shapes` (name -> shape) has a floating tensor of its shape.

    `extras` are the names of tensors that no parameter has, for the message.
    """
    if missing := [name for name in shapes if name not in stored]:
        examples = list(extras)[:3]
        advice = (
            f"They have others, such as {', '.join(examples)}: give the files of this model."
            if examples
            else "Copy or download them again."
        )
        raise UserError(
            f"{folder}: the weight files lack {len(missing)} tensors:\n{indented_list(missing[:5])}\n{advice}"
        )
    problems = [
        f"{stored[name].path.name}: {name} is {list(stored[name].shape)} of {stored[name].dtype}, "
        f"the model's is {list(shape)}"
        for name, shape in shapes.items()
        if stored[name].shape != shape or stored[name].dtype not in FILE_DTYPES
    ]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} tensors of the weight files do not fit the model that config.json describes:\n"
            f"{indented_list(problems[:5])}\n"
            f"Give the config.json that belongs to the weights, and weights of {', '.join(FILE_DTYPES)}."
        )


def fill_parameter(parameter: ms.Parameter, tensor: StoredTensor, scale: Optional[ms.Parameter] = None) -> None:
    """Reads a tensor into a parameter that has no value yet, in the parameter's dtype.

    An int8 parameter also gets its `scale`. The parameter's memory, on the device, is the only copy: the file is mapped
    only during the call. Raises ValueError for int8 if a weight is not finite.
    """
    mapped = np.memmap(tensor.path, FILE_DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)
    if scale is None:
        with np.errstate(all="ignore"):  # values beyond the range of fp16 become infinite, as in mindone
            values = [(parameter, np.array(mapped, NUMPY_DTYPES[parameter.dtype]))]
    else:
        values = [(parameter, np.empty(parameter.shape, np.int8)), (scale, np.empty(scale.shape, np.float32))]
        quantise(mapped, *(value for _, value in values))
    for target, value in values:
        target.set_data(_on_device(ms.Tensor.from_numpy(value)))
        target.init_mode = None  # otherwise copy.copy and pickle would copy the initial value that was never made


def _on_device(tensor: ms.Tensor) -> ms.Tensor:
    """Moves a tensor to the NPU. In PyNative, `stop_gradient` of a parameter in host memory copies it at every call."""
    return tensor if ON_CPU else tensor.move_to("Ascend")
