"""Builds models from their configs, fills them from their files, and saves them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters
from safetensors.numpy import save_file

from mindtune import flow
from mindtune.cli import UserError
from mindtune.files import make_readable
from mindtune.models.configs import config_file, convert_errors, image_tokens, read_config
from mindtune.models.int8 import use_int8
from mindtune.models.library import mindone
from mindtune.models.named_parameters import (
    ParameterShape,
    check_tensors,
    fill_parameter,
    model_parameters,
    parameter_shapes,
)
from mindtune.models.precision import NUMPY_DTYPES, Precision, cast_cell
from mindtune.models.replaced_layers import use_fast_ops
from mindtune.models.shared_blocks import use_shared_blocks
from mindtune.models.tokenization import check_tokenizer
from mindtune.models.weights import StoredTensor, stored_tensors, weight_files

# Endings of tensors that files contain and models do not need: positions 0, 1, 2 ..., and heads that are not used.
KNOWN_EXTRAS = (
    "embeddings.position_ids",
    "logit_scale",
    "text_projection.weight",
    "encoder.embed_tokens.weight",
    "shared.weight",
)

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the file that `save_model` writes


def import_model_class_from_model_name_or_path(root: Path, subfolder: str = "text_encoder") -> type:
    """mindone's class of a text encoder, from architectures[0] of its config. Raises ValueError for any other class."""
    architecture = read_config(Path(root), subfolder)["architectures"][0]
    if architecture not in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"):
        raise ValueError(
            f"{subfolder}: {architecture} is not supported; expected CLIPTextModel, CLIPTextModelWithProjection or "
            "T5EncoderModel"
        )
    return getattr(mindone.transformers, architecture)


# ---- loading -------------------------------------------------------------------------------------


def load_model(
    root: Path, name: str, precision: Precision, variant: Optional[str] = None, int8: bool = False
) -> nn.Cell:
    """Loads one component in evaluation mode, with the dtypes of `precision`. `int8`: see `int8.use_int8`.

    Each tensor is read from the memory-mapped file, cast or quantised, and stored in its parameter before the next one,
    so the peak memory is barely more than the weights. mindone's `from_pretrained` needs two to three times the weights
    (benchmarks/loading.py). Raises UserError if a file is damaged, or if a tensor is missing, has another shape or is
    not floating point.
    """
    # Dtypes are set while there are no values to cast.
    model = cast_cell(use_shared_blocks(use_fast_ops(_empty_model(root, name, precision.storage))), precision)
    if int8:
        use_shared_blocks(use_int8(model))
    parameters = model_parameters(model)
    scales = {key[: -len("_scale")]: parameters.pop(key) for key in list(parameters) if key.endswith(".weight_scale")}
    shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    stored, _ = _match_tensors(root, name, variant, shapes, _legacy_names(model, shapes))
    for key, tensor in stored.items():
        try:
            fill_parameter(parameters[key], tensor, scales.get(key))
        except ValueError as error:
            raise UserError(
                f"{tensor.path}: {key}: {error}, which int8 cannot hold. Copy or download it again."
            ) from None
    return model


def check_files(root: Path, names: Iterable[str], variant: Optional[str] = None) -> None:
    """Checks weight files against the configs of the components `names`, and loads tokenizers. Reads no weights.

    Prints the tensors of a file that its model does not have. Raises UserError as `load_model` and `load_tokenizer` do.
    """
    for name in names:
        if name.startswith("tokenizer"):
            check_tokenizer(root, name)
        elif name != "scheduler":
            layout = _layout(root, name)
            shapes = {parameter.name: parameter.shape for parameter in layout.parameters}
            _, extras = _match_tensors(root, name, variant, shapes, layout.legacy_names)
            if extras:
                more = f" and {len(extras) - 3} more" if len(extras) > 3 else ""
                print(f"{root / name}: the model has no tensors {', '.join(extras[:3])}{more}; they are not used")


def with_weights(root: Path, names: Iterable[str], variant: Optional[str] = None) -> list[str]:
    """The components in `names` whose weight files exist. A memory plan needs none."""
    models = [name for name in names if not name.startswith(("tokenizer", "scheduler"))]
    return [name for name in models if all(path.is_file() for path in weight_files(root, name, variant))]


def load_scheduler(root: Path):
    """The pipeline's scheduler with its config."""
    cls = getattr(mindone.diffusers, read_config(root, "scheduler")["_class_name"])
    with convert_errors(root / "scheduler"):
        return cls.from_pretrained(os.fspath(root / "scheduler"))


def create_unipc(scheduler: dict):
    """The UniPC sampler (arXiv 2302.04867) with the betas of a pipeline's scheduler config."""
    return mindone.diffusers.UniPCMultistepScheduler.from_config(scheduler)


def _empty_model(root: Path, name: str, storage: ms.Type) -> nn.Cell:
    """A component as mindone's `from_pretrained` builds it, in evaluation mode; its parameters have no memory yet."""
    # Not root and subfolder: transformers asks the hub for the optional files that a subfolder lacks.
    path = os.fspath(root / name)
    with convert_errors(root / name), no_init_parameters():
        if name.startswith("text_encoder"):
            cls = import_model_class_from_model_name_or_path(root, name)
            config = cls.config_class.from_pretrained(path)
            config.name_or_path = path
            if hasattr(config, "dtype"):  # transformers 4.56 and later
                config.dtype = str(storage).lower()
            model = cls(config)
        else:
            cls = getattr(mindone.diffusers, read_config(root, name)["_class_name"])
            model = cls.from_config(cls.load_config(path))
            model.register_to_config(_name_or_path=path)
    return model.set_train(False)


def _match_tensors(
    root: Path, name: str, variant: Optional[str], shapes: dict[str, tuple[int, ...]], legacy_names: dict[str, str]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensor of every parameter, in the order of the files, and the names of unknown tensors.

    `shapes` are those of the model's parameters.
    """
    stored, extras = {}, []
    for key, tensor in stored_tensors(root, name, variant).items():
        parameter_name = key if key in shapes else legacy_names.get(key, key)
        if parameter_name not in shapes:
            extras.append(key)
        elif parameter_name == key or parameter_name not in stored:
            shape = shapes[parameter_name]
            # Layers over channels are stored as linear layers in some files and as 1x1 convolutions in others.
            if tensor.shape != shape and _linear_shape(tensor.shape) == _linear_shape(shape):
                tensor = tensor._replace(shape=shape)
            stored[parameter_name] = tensor
    check_tensors(root / name, shapes, stored, extras)
    return stored, [key for key in extras if not key.endswith(KNOWN_EXTRAS)]


def _linear_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1x1 convolution's weight as that of a linear layer; other shapes unchanged."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _legacy_names(model: nn.Cell, names: Container[str]) -> dict[str, str]:
    """Names in older files -> current names: a VAE's attention (Stable Diffusion 1.5's file), and T5's embedding."""
    attentions = [name for name, cell in model.cells_and_names() if getattr(cell, "_from_deprecated_attn_block", False)]
    renamed = {
        f"{attention}.{old}.{parameter}": f"{attention}.{new}.{parameter}"
        for attention in attentions
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
        for parameter in ("weight", "bias")
    }
    embedding, other = "shared.weight", "encoder.embed_tokens.weight"
    renamed.update({other: embedding} if embedding in names else {embedding: other})
    return renamed


# ---- saving --------------------------------------------------------------------------------------


def save_model(model: nn.Cell, folder: Path, dtype: ms.Type) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors in diffusers' layout, with weights as `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps({"_class_name": type(model).__name__, **config}, indent=2) + "\n")
    # Not ascontiguousarray, which turns a scalar into an array of one element.
    tensors = {
        name: np.asarray(parameter.to(ms.float32).asnumpy().astype(NUMPY_DTYPES[dtype]), order="C")
        for name, parameter in model_parameters(model).items()
    }
    path = folder / WEIGHTS
    save_file(tensors, path, metadata={"format": "pt"})
    make_readable(path)


def training_sigmas(root: Path, sizes: list[tuple[int, int]], timestep_shift: str) -> tuple[np.ndarray, np.ndarray]:
    """The sigmas of FLUX's timesteps for images of each of `sizes`, float32 [S, N], and those of the largest size [N].

    `sizes` are (height, width) in pixels. They are shifted by --timestep_shift: see `flow.training_sigmas`.
    """
    tokens = [image_tokens(size, read_config(root, "vae")) for size in sizes]
    sigmas = flow.training_sigmas(
        load_scheduler(root).sigmas.asnumpy(), timestep_shift, tokens, read_config(root, "scheduler")
    )
    return sigmas, sigmas[np.argmax(tokens)]


# ---- from configs alone --------------------------------------------------------------------------


def component_shapes(root: Path, name: str) -> list[ParameterShape]:
    """Every parameter of a component, from its config alone; allocates none."""
    return _layout(root, name).parameters


def linear_layers(root: Path, name: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear layer of a component, from its config alone."""
    shapes = component_shapes(root, name)
    return {shape.name[: -len(".weight")]: shape.shape[::-1] for shape in shapes if shape.linear}


class _Layout(NamedTuple):
    """What a config tells about weight files. `legacy_names`: see `_legacy_names`."""

    parameters: list[ParameterShape]
    legacy_names: dict[str, str]


# By the contents of a config: files are checked against it, and the memory plan asks again.
_LAYOUTS: dict[tuple[bool, bytes], _Layout] = {}


def _layout(root: Path, name: str) -> _Layout:
    with convert_errors(root / name):
        key = name.startswith("text_encoder"), (root / config_file(name)).read_bytes()
    if key not in _LAYOUTS:
        model = _empty_model(root, name, ms.float32)
        _LAYOUTS[key] = _Layout(parameter_shapes(model), _legacy_names(model, model_parameters(model)))
    return _LAYOUTS[key]


def accepted_arguments(cls: type, config: dict) -> dict:
    """The items of another class's config that the constructor of `cls` accepts."""
    accepted = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in config.items() if key in accepted}
