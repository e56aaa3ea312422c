"""Finding, checking and loading the parts of a pipeline. The only file that imports mindone and knows its versions apart."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
import transformers
from mindspore import nn
from mindspore.nn.utils import no_init_parameters
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mindtune.cache import make_readable
from mindtune.cli import UserError, listing
from mindtune.flux_blocks import bind
from mindtune.int8 import quantise, use_int8
from mindtune.operators import use_operators
from mindtune.precision import LINEAR, NUMPY_TYPES, Precision, cast_cell
from mindtune.rng import generator

with contextlib.redirect_stdout(io.StringIO()):  # mindone prints which flash attention it found
    import mindone.diffusers
    import mindone.transformers
    from mindone.diffusers.training_utils import TrainStep, pynative_no_grad  # noqa: F401  (everybody else has them from here)

# Loading prints a deprecation warning of mindspore about mindone's code for every normalisation layer: nothing a user can mend.
ms.log._get_logger().addFilter(lambda record: "dtype_to_nptype" not in record.getMessage())

# mindone 0.4 moved its port of peft out of diffusers.
try:
    peft = importlib.import_module("mindone.peft")
    tuners_utils = importlib.import_module("mindone.peft.tuners.tuners_utils")
except ImportError:
    peft = importlib.import_module("mindone.diffusers._peft")
    tuners_utils = importlib.import_module("mindone.diffusers._peft.tuners.tuners_utils")
LoraConfig, BaseTunerLayer = peft.LoraConfig, tuners_utils.BaseTunerLayer

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")  # files whose reading runs what is written in them

# Component -> classes it may be of, as model_index.json and the configs name them.
FLUX_COMPONENTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "vae": ("AutoencoderKL",),
    "transformer": ("FluxTransformer2DModel",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
# Of these schedulers only the betas and the prediction type are read; pictures are drawn with UniPC.
SD_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
SD_SCHEDULERS += ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler")
SD_COMPONENTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
    "scheduler": SD_SCHEDULERS,
}
SDXL_COMPONENTS = {
    **SD_COMPONENTS,
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
# The ControlNet that belongs to a model, and what both have to agree on.
CONTROLNETS = {
    "FluxTransformer2DModel": (
        "FluxControlNetModel",
        ("num_attention_heads", "attention_head_dim", "in_channels", "joint_attention_dim", "pooled_projection_dim"),
    ),
    "UNet2DConditionModel": (
        "ControlNetModel",
        ("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"),
    ),
}
# What `load_tokenizer` can read: any one of these sets of files.
TOKENIZER_FILES = {"CLIP": (("vocab.json", "merges.txt"),), "T5": (("tokenizer.json",), ("spiece.model",))}
# Types of a weight file, as its header calls them.
FILE_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": NUMPY_TYPES[ms.bfloat16]}


class StoredTensor(NamedTuple):
    """Where a tensor is: its file, its type there (a key of FILE_TYPES if it is a float), its shape, and its first byte."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int


def set_up_device(graph_mode: bool) -> None:
    """Graph mode or PyNative. On the CPU PyNative launches blocking: handing every operator to a thread costs 7x the time."""
    ms.set_context(mode=ms.GRAPH_MODE if graph_mode else ms.PYNATIVE_MODE)
    if ms.get_context("device_target") == "CPU":
        ms.runtime.launch_blocking()


def resolve_pipeline(name: str, revision: Optional[str], variant: Optional[str], cache_dir: Optional[str], components: dict) -> Path:
    """A local directory as it is, anything else from the hub (only the named components, safetensors only); then checks it.

    Raises UserError if it is neither, or not whole (`check_pipeline`).
    """
    root = Path(name)
    if not root.is_dir():
        weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
        patterns = ["model_index.json"] + [f"{part}/{kind}" for part in components for kind in ("*.json", "*.txt", "*.model", weights)]
        root = _download("--pretrained_model_name_or_path", name, revision, cache_dir, patterns)
    check_pipeline(root, components, variant)
    return root


def resolve_configs(name: str, flag: str, cache_dir: Optional[str], components: Iterable[str], revision: Optional[str] = None) -> Path:
    """The directory of a pipeline (local, or from the hub) of which only the configs need to be there; without `components`, of a model.

    Raises UserError naming those that are missing.
    """
    root = Path(name)
    if not root.is_dir():
        root = _download(flag, name, revision, cache_dir, ["*.json"])
    configs = [f"{part}/config.json" for part in components if not part.startswith(("tokenizer", "scheduler"))] or ["config.json"]
    if missing := [config for config in configs if not (root / config).is_file()]:
        raise UserError(f"{flag} {root}: configs are read, and there is none of these:\n{listing(missing)}\nCopy them there.")
    return root


def _download(flag: str, name: str, revision: Optional[str], cache_dir: Optional[str], patterns: list[str]) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: no such directory. Give a local directory or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # no network, no such repository, gated, wrong revision: the hub's text says which
        raise UserError(f"{flag} {name}: no such directory, and the hub says: {error}") from None


def resolve_part(name: str, flag: str, cache_dir: Optional[str], cls: str) -> Path:
    """The directory of a model that stands alone (local, or from the hub), whole. Raises UserError naming all defects."""
    path = Path(name)
    if not path.is_dir():
        path = _download(flag, name, None, cache_dir, ["config.json", "*.safetensors", "*.index.json"])
    try:
        problems = _component_problems(path.parent, path.name, (cls,), None)
    except (OSError, ValueError) as error:
        problems = [str(error)]
    if problems:
        raise UserError(f"{flag} {name}: not a whole {cls}:\n{listing(problems)}\nCopy or download it again.")
    return path


def resolve_tokenizer(name: str, flag: str, cache_dir: Optional[str]) -> Path:
    """The directory of a CLIP tokenizer (local, or from the hub). Raises UserError if it lacks a file."""
    path = Path(name)
    if not path.is_dir():
        path = _download(flag, name, None, cache_dir, ["*.json", "merges.txt"])
    if problems := _component_problems(path.parent, path.name, ("CLIPTokenizer",), None):
        raise UserError(f"{flag} {name}: not a CLIP tokenizer:\n{listing(problems)}\nGive the directory of one.")
    return path


def resolve_controlnet(name: str, flag: str, cache_dir: Optional[str], base: dict) -> Path:
    """The directory of an existing ControlNet (local, or from the hub) that fits the model whose config is `base`.

    Raises UserError if it is neither, not whole, or made for another width; union ControlNets are refused.
    """
    cls, shared = CONTROLNETS[base["_class_name"]]
    path = resolve_part(name, flag, cache_dir, cls)
    config = read_config(path.parent, path.name)
    if config.get("num_mode") is not None:
        raise UserError(
            f"{flag} {name}: a union ControlNet (num_mode {config['num_mode']}) is not supported; give one for a single condition."
        )
    if cls == "FluxControlNetModel" and (channels := config.get("conditioning_embedding_channels")) is not None:
        raise UserError(
            f"{flag} {name}: takes its condition as pixels (conditioning_embedding_channels {channels}), which is not supported; give one "
            "that takes the VAE's latents."
        )
    for key in shared:
        if config.get(key) != base.get(key):
            raise UserError(f"{flag} {name}: its {key} is {config.get(key)}, the base's {base.get(key)}. Give one made for this model.")
    return path


def check_pipeline(root: Path, components: dict, variant: Optional[str] = None) -> None:
    """Every component is there, of a right class, its weights complete. Reads headers only. Raises UserError naming all defects."""
    problems = [] if (root / "model_index.json").is_file() else ["model_index.json is missing"]
    for name, classes in components.items():
        try:
            problems += _component_problems(root, name, classes, variant)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"--pretrained_model_name_or_path {root}: not a whole pipeline:\n{listing(problems)}\n"
            "Copy or download it again, in the Hugging Face layout (model_index.json, transformer/, vae/, ...)."
        )


def _component_problems(root: Path, name: str, classes: tuple, variant: Optional[str]) -> list[str]:
    folder = root / name
    if not folder.is_dir():
        return [f"{name}/ is missing"]
    if classes[0].endswith(("Tokenizer", "TokenizerFast")):
        choices = TOKENIZER_FILES["CLIP" if classes[0].startswith("CLIP") else "T5"]
        missing = [[file for file in ("tokenizer_config.json", *choice) if not (folder / file).is_file()] for choice in choices]
        if all(missing):
            return [f"{name}/{file} is missing" for file in missing[-1]]
        for path in sorted(folder.glob("*.json")):
            _read_json(root, path)
        found = _index_class(root, name)
        return [] if found in (None, *classes) else [f"model_index.json: {name} is a {found}, expected {classes[0]}"]
    config_name = "scheduler_config.json" if name == "scheduler" else "config.json"
    if not (folder / config_name).is_file():
        return [f"{name}/{config_name} is missing"]
    config = _read_json(root, folder / config_name)
    found = config.get("_class_name") or (config.get("architectures") or ["(none named)"])[0]
    if found not in classes:
        return [f"{name}/{config_name}: the class is {found}, expected {classes[0]}"]
    if name == "scheduler":
        return []
    return [problem for path in weight_files(root, name, variant) if (problem := _weights_problem(root, path))]


def _index_class(root: Path, name: str) -> Optional[str]:
    path = root / "model_index.json"
    return (_read_json(root, path).get(name) or [None, None])[1] if path.is_file() else None  # its absence is reported once


def _read_json(root: Path, path: Path) -> dict:
    """Raises ValueError naming the file if it is torn or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.relative_to(root)} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.relative_to(root)} holds no JSON object")
    return content


def weight_files(root: Path, name: str, variant: Optional[str] = None) -> list[Path]:
    """The safetensors files of a component: one, or the shards that its index names, whether they exist or not."""
    folder = root / name
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    middle = f".{variant}" if variant else ""
    for index in (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json"):
        if (folder / index).is_file():
            shards = _read_json(root, folder / index).get("weight_map") or {}
            if not shards:
                raise ValueError(f"{name}/{index} names no files (no weight_map)")
            if strange := [shard for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard]:
                raise ValueError(f"{name}/{index} names {strange[0]!r}, which is no file of this directory")
            return sorted({folder / shard for shard in shards.values()})
    return [folder / f"{stem}{middle}.safetensors"]


def linear_layers(root: Path, name: str, variant: Optional[str] = None) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear layer of a component, from the headers of its weight files."""
    shapes = {}
    for path in weight_files(root, name, variant):
        with safe_open(path, framework="numpy") as file:
            shapes.update({key: file.get_slice(key).get_shape() for key in file.keys()})
    matrices = {key[: -len(".weight")]: shape for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2}
    return {layer: (shape[1], shape[0]) for layer, shape in matrices.items() if not layer.endswith("_embedding")}


def _weights_problem(root: Path, path: Path) -> Optional[str]:
    name = path.relative_to(root)
    if not path.is_file():
        found = [f"{name.parent}/{other.name}" for other in sorted(path.parent.glob("*")) if other.suffix in PICKLED]
        return f"{name} is missing" + (f"; {found[0]} is a pickle, which can run code and is not loaded" if found else "")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length >= size:
            return f"{name} is cut short ({size:,} bytes)"
        try:
            entries = [entry for key, entry in json.loads(file.read(length)).items() if key != "__metadata__"]
            expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
            return f"{name} is not safetensors"
    if size != expected:
        return f"{name} has {size:,} bytes, its header says {expected:,}"
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{name} is not safetensors ({error})"


@contextlib.contextmanager
def from_files(folder: Path) -> Iterator[None]:
    """Says of whatever goes wrong inside that the files of `folder` are to blame: libraries raise anything for odd values. UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be made from its files ({type(error).__name__}: {error}). Copy or download them again."
        ) from error


def read_config(root: Path, name: str) -> dict:
    """A component's config.json (scheduler_config.json) as a plain dict."""
    return json.loads((root / name / ("scheduler_config.json" if name == "scheduler" else "config.json")).read_text())


def import_model_class_from_model_name_or_path(root: Path, subfolder: str = "text_encoder") -> type:
    """mindone's class for a text encoder, chosen by architectures[0] of its config. Raises ValueError for any other."""
    architecture = read_config(Path(root), subfolder)["architectures"][0]
    if architecture not in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"):
        raise ValueError(
            f"{subfolder}: {architecture} is not supported; expected CLIPTextModel, CLIPTextModelWithProjection or T5EncoderModel"
        )
    return getattr(mindone.transformers, architecture)


def load_model(root: Path, name: str, precision: Precision, variant: Optional[str] = None, int8: bool = False) -> nn.Cell:
    """One component with its weights, in evaluation mode, stored and computed as `precision` says; `int8`: see `use_int8`.

    Each tensor goes from the memory-mapped file into its parameter, cast or quantised on the way, before the next is read: the peak is
    the weights and a little. mindone's `from_pretrained` takes two to three times the weights (benchmarks/loading.py).
    Raises UserError if a file is torn, or lacks weights that the model has, or has them in another shape or in a type that is no float.
    """
    # Types are given first, while there is nothing to cast.
    model = cast_cell(bind(use_operators(_without_weights(root, name, precision.storage))), precision)
    if int8:
        bind(use_int8(model))
    parameters, renamed = model_parameters(model), _old_attention_names(model)
    scales = {key[: -len("_scale")]: parameters.pop(key) for key in list(parameters) if key.endswith(".weight_scale")}
    stored = {renamed.get(key, key): tensor for key, tensor in _stored_tensors(root, name, variant).items()}
    _check_fit(root / name, parameters, stored)
    for key, tensor in stored.items():
        if key in parameters:  # files may have more, such as the position ids of old CLIPs
            try:
                _fill(parameters[key], tensor, scales.get(key))
            except ValueError as error:
                raise UserError(f"{tensor.path}: {key}: {error}, which int8 cannot hold. Copy or download it again.") from None
    return model


def _without_weights(root: Path, name: str, storage: ms.Type) -> nn.Cell:
    """A component as mindone's `from_pretrained` makes it, in evaluation mode, with parameters that have no memory yet."""
    path = os.fspath(root / name)  # not root and subfolder: transformers asks the hub for optional files of a subfolder that is not there
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


def _old_attention_names(model: nn.Cell) -> dict[str, str]:
    """Name in old files -> name now, for the attention of VAEs (Stable Diffusion 1.5's file has the old ones)."""
    places = [name for name, cell in model.cells_and_names() if getattr(cell, "_from_deprecated_attn_block", False)]
    return {
        f"{place}.{old}.{kind}": f"{place}.{new}.{kind}"
        for place in places
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
        for kind in ("weight", "bias")
    }


def _stored_tensors(root: Path, name: str, variant: Optional[str]) -> dict[str, StoredTensor]:
    """Every tensor of a component's files by its name, in the files' order; reads headers only. Raises UserError for a torn file."""
    stored = {}
    for path in weight_files(root, name, variant):
        if problem := _weights_problem(root, path):
            raise UserError(f"{root}: {problem}. Copy or download it again.")
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            stored[key] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    return stored


def _check_fit(folder: Path, parameters: dict[str, ms.Parameter], stored: dict[str, StoredTensor]) -> None:
    """Raises UserError unless there is a tensor for every parameter, of its shape and of a floating type."""
    if missing := [key for key in parameters if key not in stored]:
        raise UserError(f"{folder}: the weight files lack {len(missing)} tensors:\n{listing(missing[:5])}\nCopy or download them again.")
    pairs = [(key, parameter.shape, stored[key]) for key, parameter in parameters.items()]
    problems = [
        f"{tensor.path.name}: {key} is {list(tensor.shape)} of {tensor.kind}, the model's is {list(shape)}"
        for key, shape, tensor in pairs
        if tensor.shape != shape or tensor.kind not in FILE_TYPES
    ]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} tensors of the weight files do not fit the model that config.json describes:\n"
            f"{listing(problems[:5])}\nGive the config.json that belongs to the weights, and weights of {', '.join(FILE_TYPES)}."
        )


def _fill(parameter: ms.Parameter, tensor: StoredTensor, scale: Optional[ms.Parameter] = None) -> None:
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
        name: np.asarray(p.to(ms.float32).asnumpy().astype(NUMPY_TYPES[dtype]), order="C") for name, p in model_parameters(model).items()
    }
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    make_readable(path)


def flux_controlnet(root: Path, num_layers: int, num_single_layers: int, variant: Optional[str] = None) -> nn.Cell:
    """A ControlNet that starts as a copy of the transformer's embedders and first blocks, float32, its added projections zero.

    The copies are read from the transformer's files: what is in memory may be int8. Zero outputs make the first prediction the base
    model's own. Source: Zhang et al., "Adding Conditional Control" (arXiv 2302.05543).
    """
    controlnet, stored = empty_flux_controlnet(root, num_layers, num_single_layers), _stored_tensors(root, "transformer", variant)
    added = ("controlnet_x_embedder.", "controlnet_blocks.", "controlnet_single_blocks.")
    parameters = model_parameters(controlnet)
    copied = {name: parameter for name, parameter in parameters.items() if not name.startswith(added)}
    _check_fit(root / "transformer", copied, stored)
    for name, parameter in parameters.items():
        if name in copied:
            _fill(parameter, stored[name])
        else:
            parameter.set_data(ms.Tensor(np.zeros(parameter.shape, np.float32)))
            parameter.init_mode = None
    return bind(use_operators(controlnet))


def empty_flux_controlnet(root: Path, num_layers: int, num_single_layers: int) -> nn.Cell:
    """A new ControlNet of a transformer's width in evaluation mode, with float32 parameters that have no memory yet."""
    config = {key: value for key, value in read_config(root, "transformer").items() if not key.startswith("_")}
    config.pop("out_channels", None)
    config.update(num_layers=num_layers, num_single_layers=num_single_layers)
    with no_init_parameters():
        return mindone.diffusers.FluxControlNetModel(**config).set_train(False)


def unet_controlnet(unet: nn.Cell, seed: int) -> nn.Cell:
    """A ControlNet that starts as a copy of a UNet's first half, float32, its added projections zero.

    Its layers that read the condition picture start as PyTorch's convolutions do, uniform in +-1 / sqrt(inputs), from `seed`.
    Source: Zhang et al., "Adding Conditional Control" (arXiv 2302.05543), section 3.2.
    """
    controlnet = mindone.diffusers.ControlNetModel(**_controlnet_config(dict(unet.config)))
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


def _controlnet_config(unet: dict) -> dict:
    """What a ControlNet takes of a UNet's config."""
    known = inspect.signature(mindone.diffusers.ControlNetModel.__init__).parameters
    return {key: value for key, value in unet.items() if key in known}


class Shape(NamedTuple):
    """Of a parameter: its name in the weight files, its shape, and whether it is the weight of a linear layer."""

    name: str
    shape: tuple[int, ...]
    linear: bool


def shapes(root: Path, name: str) -> list[Shape]:
    """Every parameter of a component, from its config alone; none is allocated."""
    return _shapes(_without_weights(root, name, ms.float32))


def controlnet_shapes(root: Path, base: str, num_layers: int = 0, num_single_layers: int = 0) -> list[Shape]:
    """The same of a new ControlNet for the pipeline's `base`, transformer or unet; blocks are those of a FLUX ControlNet."""
    if base == "transformer":
        return _shapes(empty_flux_controlnet(root, num_layers, num_single_layers))
    with no_init_parameters():
        return _shapes(mindone.diffusers.ControlNetModel(**_controlnet_config(read_config(root, base))))


def _shapes(model: nn.Cell) -> list[Shape]:
    linear = {f"{name}.weight" for name, cell in model.cells_and_names() if isinstance(cell, LINEAR)}
    return [Shape(name, tuple(parameter.shape), name in linear) for name, parameter in model_parameters(model).items()]


def load_tokenizer(folder: Path):
    """CLIPTokenizer for a folder with a vocab.json, T5TokenizerFast for any other. Raises UserError if its files make none."""
    cls = transformers.CLIPTokenizer if (folder / "vocab.json").is_file() else transformers.T5TokenizerFast
    with from_files(folder):
        return cls.from_pretrained(os.fspath(folder))


def load_scheduler(root: Path):
    """The sampling scheduler with its config."""
    cls = getattr(mindone.diffusers, read_config(root, "scheduler")["_class_name"])
    with from_files(root / "scheduler"):
        return cls.from_pretrained(os.fspath(root / "scheduler"))


def unipc(scheduler: dict):
    """The UniPC sampler (arXiv 2302.04867) on the betas of a pipeline's scheduler config."""
    return mindone.diffusers.UniPCMultistepScheduler.from_config(scheduler)


def recompute_unet(model: nn.Cell) -> None:
    """Activations of a UNet's or ControlNet's residual and transformer blocks are computed again in the backward pass, not kept.

    mindone's own switch leaves out the first residual block of every level and all attention.
    """
    for _, cell in model.cells_and_names():
        if type(cell).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            cell.recompute()


def flux_skeleton(root: Path) -> nn.Cell:
    """The transformer's structure at its real depth and a toy width, for looking at names before gigabytes load."""
    config = {k: v for k, v in read_config(root, "transformer").items() if not k.startswith("_")}
    tiny = {"num_attention_heads": 1, "attention_head_dim": 8, "axes_dims_rope": (4, 2, 2)}
    tiny.update(joint_attention_dim=8, pooled_projection_dim=8, in_channels=4)
    return bind(mindone.diffusers.FluxTransformer2DModel(**{**config, **tiny}))  # with the cells that a loaded one has
