"""Building models from their configs, filling them from their files, and saving them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
import transformers
from mindspore import nn
from mindspore.nn.utils import no_init_parameters
from safetensors.numpy import save_file

from mindtune.cli import UserError, indented_list
from mindtune.files import make_readable
from mindtune.models.configs import from_files, read_config
from mindtune.models.fast_ops import use_operators
from mindtune.models.flux_blocks import bind
from mindtune.models.int8 import quantise, use_int8
from mindtune.models.library import mindone
from mindtune.models.precision import LINEAR, NUMPY_TYPES, Precision, cast_cell
from mindtune.models.weights import FILE_TYPES, StoredTensor, stored_tensors, weight_files

CLIP_LENGTH = 77  # tokens that CLIP was trained on
# Ends of the names of tensors that files have and models do not need: positions 0, 1, 2 ..., and heads that are not used.
KNOWN_EXTRAS = (
    "embeddings.position_ids",
    "logit_scale",
    "text_projection.weight",
    "encoder.embed_tokens.weight",
    "shared.weight",
)


def import_model_class_from_model_name_or_path(root: Path, subfolder: str = "text_encoder") -> type:
    """mindone's class for a text encoder, chosen by architectures[0] of its config. Raises ValueError for any other."""
    architecture = read_config(Path(root), subfolder)["architectures"][0]
    if architecture not in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"):
        raise ValueError(
            f"{subfolder}: {architecture} is not supported; expected CLIPTextModel, CLIPTextModelWithProjection or T5EncoderModel"
        )
    return getattr(mindone.transformers, architecture)


def load_model(
    root: Path, name: str, precision: Precision, variant: Optional[str] = None, int8: bool = False
) -> nn.Cell:
    """One component with its weights, in evaluation mode, stored and computed as `precision` says; `int8`: see `use_int8`.

    Each tensor goes from the memory-mapped file into its parameter, cast or quantised on the way, before the next is read: the peak is
    the weights and a little. mindone's `from_pretrained` takes two to three times the weights (benchmarks/loading.py).
    Raises UserError if a file is torn, or lacks weights that the model has, or has them in another shape or in a type that is no float.
    """
    # Types are given first, while there is nothing to cast.
    model = cast_cell(bind(use_operators(_without_weights(root, name, precision.storage))), precision)
    if int8:
        bind(use_int8(model))
    parameters = model_parameters(model)
    scales = {key[: -len("_scale")]: parameters.pop(key) for key in list(parameters) if key.endswith(".weight_scale")}
    stored, _ = _fitting(root, name, variant, model, parameters)
    for key, tensor in stored.items():
        try:
            fill_parameter(parameters[key], tensor, scales.get(key))
        except ValueError as error:
            raise UserError(
                f"{tensor.path}: {key}: {error}, which int8 cannot hold. Copy or download it again."
            ) from None
    return model


def check_files(root: Path, names: Iterable[str], variant: Optional[str] = None) -> None:
    """Weight files have what the configs of the components `names` describe, and tokenizers can be made; no weights are read.

    Prints which tensors a file has that its model does not know. Raises UserError as `load_model` and `load_tokenizer` do.
    """
    for name in names:
        if name.startswith("tokenizer"):
            _check_tokenizer(root, name)
        elif name != "scheduler":
            model = _without_weights(root, name, ms.float32)
            _, extras = _fitting(root, name, variant, model, model_parameters(model))
            if extras:
                more = f" and {len(extras) - 3} more" if len(extras) > 3 else ""
                print(f"{root / name}: the model has no tensors {', '.join(extras[:3])}{more}; they are not used")


def with_weights(root: Path, names: Iterable[str], variant: Optional[str] = None) -> list[str]:
    """The components whose weight files are there: a plan can do without."""
    models = [name for name in names if not name.startswith(("tokenizer", "scheduler"))]
    return [name for name in models if all(path.is_file() for path in weight_files(root, name, variant))]


def _check_tokenizer(root: Path, name: str) -> None:
    """Raises UserError for one that gives ids which its text encoder has no embedding for, or lacks a special token."""
    tokenizer, encoder = load_tokenizer(root / name), name.replace("tokenizer", "text_encoder")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if lacking := [key for key, value in special.items() if value is None]:
        raise UserError(f"{root / name}: has no {', '.join(lacking)}. Copy or download the folder again.")
    vocabulary = read_config(root, encoder)["vocab_size"] if (root / encoder).is_dir() else len(tokenizer)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{root / name}: has {len(tokenizer)} tokens, and {encoder}/config.json a vocab_size of {vocabulary}. Tokens that were "
            "added need embeddings; give the tokenizer that belongs to the text encoder."
        )


def _fitting(
    root: Path, name: str, variant: Optional[str], model: nn.Cell, parameters: dict[str, ms.Parameter]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensor of every parameter of `model`, in the files' order, and the names of those that are no parameter's."""
    renamed, stored, extras = _old_names(model, parameters), {}, []
    for key, tensor in stored_tensors(root, name, variant).items():
        own = key if key in parameters else renamed.get(key, key)
        if own not in parameters:
            extras.append(key)
        elif own == key or own not in stored:
            shape = tuple(parameters[own].shape)
            # Layers over channels are stored as linear ones in some files and as 1x1 convolutions in others.
            if tensor.shape != shape and _without_ones(tensor.shape) == _without_ones(shape):
                tensor = tensor._replace(shape=shape)
            stored[own] = tensor
    check_fit(root / name, parameters, stored, extras)
    return stored, [key for key in extras if not key.endswith(KNOWN_EXTRAS)]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _without_weights(root: Path, name: str, storage: ms.Type) -> nn.Cell:
    """A component as mindone's `from_pretrained` makes it, in evaluation mode, with parameters that have no memory yet."""
    path = os.fspath(
        root / name
    )  # not root and subfolder: transformers asks the hub for optional files of a subfolder that is not there
    with from_files(root / name), no_init_parameters():
        if name.startswith("text_encoder"):
            cls = import_model_class_from_model_name_or_path(root, name)
            config = cls.config_class.from_pretrained(path)
            config.name_or_path = path
            if hasattr(config, "dtype"):  # of transformers 4.56 and later
                config.dtype = str(storage).lower()
            model = cls(config)
        else:
            cls = getattr(mindone.diffusers, read_config(root, name)["_class_name"])
            model = cls.from_config(cls.load_config(path))
            model.register_to_config(_name_or_path=path)
    return model.set_train(False)


def _old_names(model: nn.Cell, parameters: dict[str, ms.Parameter]) -> dict[str, str]:
    """Name in files of some versions -> name now: a VAE's attention (Stable Diffusion 1.5's file), and T5's embedding, which has two."""
    places = [name for name, cell in model.cells_and_names() if getattr(cell, "_from_deprecated_attn_block", False)]
    renamed = {
        f"{place}.{old}.{kind}": f"{place}.{new}.{kind}"
        for place in places
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
        for kind in ("weight", "bias")
    }
    embedding, other = "shared.weight", "encoder.embed_tokens.weight"
    renamed.update({other: embedding} if embedding in parameters else {embedding: other})
    return renamed


def check_fit(
    folder: Path, parameters: dict[str, ms.Parameter], stored: dict[str, StoredTensor], extras: Iterable[str] = ()
) -> None:
    """Raises UserError unless there is a tensor for every parameter, of its shape and of a floating type."""
    if missing := [key for key in parameters if key not in stored]:
        instead = list(extras)[:3]
        advice = (
            f"They have others, such as {', '.join(instead)}: give the files of this model."
            if instead
            else "Copy or download them again."
        )
        raise UserError(
            f"{folder}: the weight files lack {len(missing)} tensors:\n{indented_list(missing[:5])}\n{advice}"
        )
    pairs = [(key, parameter.shape, stored[key]) for key, parameter in parameters.items()]
    problems = [
        f"{tensor.path.name}: {key} is {list(tensor.shape)} of {tensor.kind}, the model's is {list(shape)}"
        for key, shape, tensor in pairs
        if tensor.shape != shape or tensor.kind not in FILE_TYPES
    ]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} tensors of the weight files do not fit the model that config.json describes:\n"
            f"{indented_list(problems[:5])}\nGive the config.json that belongs to the weights, and weights of {', '.join(FILE_TYPES)}."
        )


def fill_parameter(parameter: ms.Parameter, tensor: StoredTensor, scale: Optional[ms.Parameter] = None) -> None:
    """The value of a parameter that has none yet, in the parameter's type; of an int8 one also its `scale`.

    Their memory is the only copy; the mapping ends here. Raises ValueError for int8 if a weight is not finite.
    """
    mapped = np.memmap(tensor.path, FILE_TYPES[tensor.kind], "r", tensor.offset, tensor.shape)
    if scale is None:
        with np.errstate(all="ignore"):  # what is beyond fp16 becomes infinite, as with mindone
            values = [(parameter, np.array(mapped, NUMPY_TYPES[parameter.dtype]))]
    else:
        values = [(parameter, np.empty(parameter.shape, np.int8)), (scale, np.empty(scale.shape, np.float32))]
        quantise(mapped, *(value for _, value in values))
    for filled, value in values:
        filled.set_data(ms.Tensor.from_numpy(value))
        filled.init_mode = None  # copy.copy and pickle would take the start that was never made


def hf_name(name: str) -> str:
    """The Hugging Face name of a MindSpore parameter. mindone's save_pretrained would write MindSpore's own."""
    for ours, theirs in ((".gamma", ".weight"), (".beta", ".bias"), (".embedding_table", ".weight")):
        if name.endswith(ours):
            return name[: -len(ours)] + theirs
    return name


def model_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """Every parameter by its name in the weight files."""
    return {hf_name(name): parameter for name, parameter in model.parameters_and_names()}


def save_model(model: nn.Cell, folder: Path, dtype: ms.Type) -> None:
    """config.json and diffusion_pytorch_model.safetensors, as diffusers lays a model out; floating weights as `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps({"_class_name": type(model).__name__, **config}, indent=2) + "\n")
    # Not ascontiguousarray, which makes a scalar an array of one.
    tensors = {
        name: np.asarray(p.to(ms.float32).asnumpy().astype(NUMPY_TYPES[dtype]), order="C")
        for name, p in model_parameters(model).items()
    }
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    make_readable(path)


class Shape(NamedTuple):
    """Of a parameter: its name in the weight files, its shape, and whether it is the weight of a linear layer."""

    name: str
    shape: tuple[int, ...]
    linear: bool


def shapes(root: Path, name: str) -> list[Shape]:
    """Every parameter of a component, from its config alone; none is allocated."""
    return parameter_shapes(_without_weights(root, name, ms.float32))


def parameter_shapes(model: nn.Cell) -> list[Shape]:
    linear = {f"{name}.weight" for name, cell in model.cells_and_names() if isinstance(cell, LINEAR)}
    return [Shape(name, tuple(parameter.shape), name in linear) for name, parameter in model_parameters(model).items()]


def load_tokenizer(folder: Path):
    """CLIPTokenizer for a folder with a vocab.json, T5TokenizerFast for any other. Raises UserError if its files make none."""
    with from_files(folder):
        if (folder / "vocab.json").is_file():
            tokenizer = transformers.CLIPTokenizer.from_pretrained(os.fspath(folder))
            # A tokenizer_config.json without model_max_length stands for no limit, which CLIP's positions have.
            if not 2 < tokenizer.model_max_length <= CLIP_LENGTH:
                tokenizer.model_max_length = CLIP_LENGTH
            return tokenizer
        # add_prefix_space, which FLUX.1's config has, makes the tokenizer anew from spiece.model; tokenizer.json has it done.
        options = {} if (folder / "spiece.model").is_file() else {"add_prefix_space": None}
        tokenizer = transformers.T5TokenizerFast.from_pretrained(os.fspath(folder), **options)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):  # False, for a spiece.model that is none
            raise ValueError("spiece.model holds no SentencePiece model")
        return tokenizer


def load_scheduler(root: Path):
    """The sampling scheduler with its config."""
    cls = getattr(mindone.diffusers, read_config(root, "scheduler")["_class_name"])
    with from_files(root / "scheduler"):
        return cls.from_pretrained(os.fspath(root / "scheduler"))


def unipc(scheduler: dict):
    """The UniPC sampler (arXiv 2302.04867) on the betas of a pipeline's scheduler config."""
    return mindone.diffusers.UniPCMultistepScheduler.from_config(scheduler)


def flux_skeleton(root: Path) -> nn.Cell:
    """The transformer's structure at its real depth and a toy width, for looking at names before gigabytes load."""
    config = known_arguments(mindone.diffusers.FluxTransformer2DModel, read_config(root, "transformer"))
    tiny = {"num_attention_heads": 1, "attention_head_dim": 8, "axes_dims_rope": (4, 2, 2)}
    tiny.update(joint_attention_dim=8, pooled_projection_dim=8, in_channels=4)
    return bind(mindone.diffusers.FluxTransformer2DModel(**{**config, **tiny}))  # with the cells that a loaded one has


def known_arguments(cls: type, config: dict) -> dict:
    """What a class takes of the config of another one."""
    known = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in config.items() if key in known}
