"""LoRA: where it goes, how it starts, and the file in which it travels.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). The file layout is diffusers':
`transformer.<module>.lora_A.weight`, `text_encoder.<module>.lora_B.weight` ..., rank, alpha and targets as JSON in the header; files
in the other layouts of `lora_names` are read too.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from safetensors.numpy import save

from mindtune.cli import UserError
from mindtune.models import lora_layouts, lora_names
from mindtune.models.flux_blocks import bind
from mindtune.models.library import BaseTunerLayer, LoraConfig
from mindtune.models.mapped import read_mapped
from mindtune.models.precision import LINEAR, NUMPY_TYPES
from mindtune.models.weights import PICKLED
from mindtune.rng import normal

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
TRANSFORMER_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def check_targets(model: nn.Cell, targets: Iterable[str], flag: str) -> None:
    """Every target ends the name of some linear layer of `model`. Raises UserError offering near names."""
    names = [name for name, cell in model.cells_and_names() if isinstance(cell, LINEAR)]
    suffixes = sorted({".".join(name.split(".")[-n:]) for name in names for n in (1, 2)} - {"0", "2"})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, suffixes, n=4, cutoff=0.5) or suffixes
            raise UserError(f"{flag} {target}: no linear layer has that name. Near names: {', '.join(near)}.")


def add_lora(model: nn.Cell, rank: int, alpha: float, dropout: float, targets: list[str], compute: ms.Type) -> None:
    """Injects trainable low-rank layers beside the targets; they compute in `compute`, whatever they are stored in."""
    model.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=list(targets)
        )
    )
    _compute_in(model, compute)


def _compute_in(model: nn.Cell, compute: ms.Type) -> None:
    """float32 low-rank layers in a half-precision model do their products in its type."""
    bind(model)
    if compute != ms.float32:
        for _, cell in model.cells_and_names():
            if isinstance(cell, BaseTunerLayer):
                for layer in (*cell.lora_A.values(), *cell.lora_B.values()):
                    layer.to_float(compute)


def init_lora(model: nn.Cell, rank: int, seed: int) -> None:
    """A ~ N(0, 1/rank), B = 0, as peft's "gaussian", but drawn by name, so that depth or order change no layer's start."""
    for name, parameter in lora_parameters(model).items():
        value = (
            normal(seed, f"lora/{name}", shape=parameter.shape) / rank
            if ".lora_A." in name
            else np.zeros(parameter.shape)
        )
        parameter.set_data(ms.Tensor(value.astype(np.float32), parameter.dtype))


def lora_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """LoRA parameters by their name in the file, without prefix: `<module>.lora_A.weight`."""
    return {
        name.replace(".default.", "."): p
        for name, p in model.parameters_and_names()
        if ".lora_A." in name or ".lora_B." in name
    }


def enable_lora(model: nn.Cell, enabled: bool) -> None:
    """Switches the adapter on or off for PyNative calls (a compiled graph keeps what it was compiled with)."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, BaseTunerLayer):
            cell._disable_adapters = not enabled
    bind(model)


def save_lora(path: Path, models: dict[str, nn.Cell], dtype: ms.Type) -> None:
    """Writes the adapters of `models` (prefix -> cell) to one file in diffusers' layout and in `dtype`; see `write_lora`."""
    tensors, alphas = {}, {}
    for prefix, model in models.items():
        tensors.update({f"{prefix}.{name}": parameter.asnumpy() for name, parameter in lora_parameters(model).items()})
        layers = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, BaseTunerLayer)}
        alphas.update({f"{prefix}.{name}": float(layer.lora_alpha["default"]) for name, layer in layers.items()})
    write_lora(path, tensors, alphas, "diffusers", dtype)


def write_lora(
    path: Path, tensors: dict[str, np.ndarray], alphas: dict[str, float], layout: str, dtype: Optional[ms.Type] = None
) -> dict[str, int]:
    """Writes what `read_lora` gives to a file in one of `lora_layouts.LAYOUTS`, in `dtype` (None: as the tensors are).

    In diffusers' layout alpha / rank is multiplied into B and the header says alpha = rank: tools that ignore the header run an
    adapter at alpha = rank, and `.alpha` entries are refused by those that read it. The other layouts have `.alpha` entries.
    Returns the rank of every layer in the file. Raises ValueError for a layer that the layout has no name for.
    """
    if layout == "diffusers":
        header = {
            "lora_adapter_metadata": json.dumps(_settings(tensors)),
            "trained_lora_alpha": str(_most(alphas.values())),
        }
        folded = _at_scale_one(tensors, alphas)
        tensors = (
            folded if dtype is not None else {name: value.astype(tensors[name].dtype) for name, value in folded.items()}
        )
    else:
        entries = {f"{module}.alpha": np.array(alpha, np.float32) for module, alpha in alphas.items()}
        tensors, header = lora_layouts.from_diffusers({**tensors, **entries}, layout), {}
    ranks = lora_layouts.ranks(tensors)
    if layout == "kohya":
        # sd-scripts' resizing tool says Dynamic, too, of a file whose layers differ.
        header = {"ss_network_module": "networks.lora_flux"}
        for key, values in (
            ("dim", set(ranks.values())),
            ("alpha", {float(v) for k, v in tensors.items() if k.endswith(".alpha")}),
        ):
            header[f"ss_network_{key}"] = str(values.pop()) if len(values) == 1 else "Dynamic"
    if dtype is not None:
        tensors = {
            name: value if name.endswith(".alpha") else value.astype(NUMPY_TYPES[dtype])
            for name, value in tensors.items()
        }
    path.write_bytes(_with_header(save(tensors), {"format": "pt", **header}))
    return ranks


def _settings(tensors: dict[str, np.ndarray]) -> dict:
    """What diffusers makes its LoraConfig of, by prefix; it looks into both patterns."""
    found: dict = {}
    for name, rank in lora_layouts.ranks(tensors).items():
        prefix, _, module = name.partition(".")
        found.setdefault(prefix, {})[module] = rank
    settings = {}
    for prefix, ranks in found.items():
        rank, pattern = _rank_and_pattern(ranks)
        own = {
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(ranks),
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
        }
        settings.update({f"{prefix}.{name}": value for name, value in own.items()})
    return settings


def _rank_and_pattern(ranks: dict[str, int]) -> tuple[int, dict[str, int]]:
    """peft's r and rank_pattern. A pattern's key also counts for names that end in it, and FLUX's last layer is named as the end of
    other layers' names: its rank must be r."""
    rank = ranks.get("proj_out", _most(ranks.values()))
    return rank, {name: own for name, own in sorted(ranks.items()) if own != rank}


def _most(values: Iterable) -> float:
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]


def _at_scale_one(tensors: dict[str, np.ndarray], alphas: dict[str, float]) -> dict[str, np.ndarray]:
    """A and B with alpha / rank multiplied into B, which is float32 then unless that is 1."""
    ranks, out = lora_layouts.ranks(tensors), dict(tensors)
    for module, alpha in alphas.items():
        if alpha != ranks[module]:
            name = f"{module}.lora_B.weight"
            out[name] = tensors[name].astype(np.float32) * np.float32(alpha / ranks[module])
    return out


def _with_header(file: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with `metadata` in this order: the library writes it in another order every time, and equal runs shall
    leave equal bytes. Layout: length of the JSON header (8 bytes), the header padded to 8 bytes, the data."""
    length = int.from_bytes(file[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(file[8 : 8 + length])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + length :]


def find_lora(name: str, flag: str) -> Path:
    """The file itself, or the adapter in the directory of a run or checkpoint, or of peft. Raises UserError if there is none."""
    path = Path(name)
    if path.is_dir():
        path = path / (PEFT_FILE if (path / PEFT_FILE).is_file() and not (path / LORA_FILE).is_file() else LORA_FILE)
    if path.suffix in PICKLED:
        raise UserError(f"{flag} {path}: a pickle, which can run code and is not loaded. Give a .safetensors file.")
    if not path.is_file():
        raise UserError(
            f"{flag} {path}: no such file. Give the .safetensors file, or the directory a training run wrote."
        )
    return path


def read_lora(path: Path, flag: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """A and B of a LoRA file by diffusers' names, and alpha by layer: from `.alpha` entries, else from the settings, else the rank.

    Settings are in the header of diffusers' files and in adapter_config.json beside peft's. The arrays may lie in the file. Raises
    UserError, which says what the file is, unless it is a plain LoRA of FLUX.1 in one of `lora_names.LAYOUTS_READ`.
    """
    try:
        found, header = read_mapped(path)
        tensors = lora_layouts.to_diffusers(found)
    except ValueError as error:
        raise UserError(f"{flag} {path}: {error}.") from None
    settings = (
        {}
        if any(name.endswith("alpha") for name in found)
        else _settings_beside(path, header, lora_names.layout_of(found), flag)
    )
    try:
        return tensors, _alphas(tensors, settings)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:  # settings of another shape
        raise UserError(
            f"{flag} {path}: the settings that come with it cannot be used ({error}). Give a LoRA of FLUX.1."
        ) from None


def _settings_beside(path: Path, header: dict[str, str], layout: str, flag: str) -> dict:
    """peft's settings of a file, each name after its model and a dot."""
    beside = path.with_name(PEFT_SETTINGS)
    try:
        if layout == "diffusers":
            return json.loads(header.get("lora_adapter_metadata", "{}"))
        if layout in ("peft", "bare") and beside.is_file():
            own = json.loads(beside.read_text(encoding="utf-8"))
            return {
                f"{model}.{name}": value for model in ("transformer", "text_encoder") for name, value in own.items()
            }
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{flag} {path}: the settings that come with it cannot be read ({error}). Give a LoRA of FLUX.1."
        ) from None
    return {}


def _alphas(tensors: dict[str, np.ndarray], settings: dict) -> dict[str, float]:
    """Alpha of every layer; its `.alpha` entry, if there is one, is taken out of `tensors`.

    Of settings with use_rslora the alpha that gives the same change: peft scales by alpha / sqrt(rank) then.
    """
    alphas = {}
    for name, rank in lora_layouts.ranks(tensors).items():
        prefix, _, module = name.partition(".")
        patterns = settings.get(f"{prefix}.alpha_pattern") or {}  # as peft reads it: whole names or their ends
        own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alphas[name] = float(next(own, settings.get(f"{prefix}.lora_alpha", rank)))
        if settings.get(f"{prefix}.use_rslora"):
            alphas[name] *= math.sqrt(rank)
        if (entry := tensors.pop(f"{name}.alpha", None)) is not None:
            alphas[name] = float(entry.item())
        if not math.isfinite(alphas[name]):
            raise ValueError(f"alpha of {name} is {alphas[name]}")
    return alphas


def read_parts(path: Path, flag: str) -> dict[str, dict[str, np.ndarray]]:
    """A LoRA file as prefix of a model -> `<layer>.lora_A.weight` ... -> float32, alpha / rank multiplied into B."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _at_scale_one(*read_lora(path, flag)).items():
        prefix, _, own = name.partition(".")
        parts.setdefault(prefix, {})[own] = value.astype(np.float32, order="C")
    return parts


def check_parts(
    path: Path, flag: str, parts: dict[str, dict[str, np.ndarray]], layers: dict[str, dict[str, tuple[int, int]]]
) -> None:
    """Raises UserError unless all that `parts` adapt is in `layers` (prefix -> layer -> inputs and outputs), with these widths."""
    if foreign := sorted(set(parts) - set(layers)):
        raise UserError(f"{flag} {path}: made for another model; it adapts {foreign[0]}, not {' or '.join(layers)}.")
    for prefix, part in parts.items():
        for name, rank in lora_layouts.ranks(part).items():
            if name not in layers[prefix]:
                raise UserError(f"{flag} {path}: made for another model; this {prefix} has no layer {name}.")
            (inputs, outputs), found = layers[prefix][name], [part[f"{name}.lora_{half}.weight"].shape for half in "AB"]
            if found != [(rank, inputs), (outputs, rank)]:
                raise UserError(
                    f"{flag} {path}: made for another model; A and B of {name} are {found[0]} and {found[1]}, the layer of this "
                    f"{prefix} takes {inputs} and gives {outputs}."
                )


def describe(parts: dict[str, dict[str, np.ndarray]]) -> str:
    """Such as "transformer: 190 layers of rank 16"."""
    return "; ".join(f"{prefix}: {count_ranks(lora_layouts.ranks(part))}" for prefix, part in parts.items())


def count_ranks(ranks: dict[str, int]) -> str:
    """Such as "190 layers of rank 4, 16"."""
    return f"{len(ranks)} layers of rank {', '.join(map(str, sorted(set(ranks.values()))))}"


def load_lora(
    path: Path, models: dict[str, nn.Cell], compute: ms.Type, flag: str = "--lora", scale: float = 1.0
) -> None:
    """Injects the adapter of a file into `models` (prefix -> cell) for inference, `scale` times as strong.

    Raises UserError if the file is no LoRA, or names models, layers or widths that are not those of `models`.
    """
    parts, layers = read_parts(path, flag), {}
    for prefix, model in models.items():
        linear = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, LINEAR)}
        layers[prefix] = {name: cell.weight.shape[::-1] for name, cell in linear.items()}
    check_parts(path, flag, parts, layers)
    for prefix, part in parts.items():
        strong = {name: value * np.float32(scale) if ".lora_B." in name else value for name, value in part.items()}
        add_trained_lora(models[prefix], strong, None, 0.0, compute)
        for parameter in lora_parameters(models[prefix]).values():
            parameter.requires_grad = False


def add_trained_lora(
    model: nn.Cell, part: dict[str, np.ndarray], alpha: Optional[float], dropout: float, compute: ms.Type
) -> None:
    """Injects trainable low-rank layers that hold what a checked part of a file says, each with its own rank.

    Their scale is `alpha` / the most frequent rank (None: 1) and B is divided by it: the model computes the same whatever the scale.
    """
    ranks = lora_layouts.ranks(part)
    scale = 1.0 if alpha is None else alpha / _most(ranks.values())
    rank, pattern = _rank_and_pattern(ranks)
    config = LoraConfig(
        r=rank, lora_alpha=scale * rank, rank_pattern=pattern, alpha_pattern={name: scale * own for name, own in pattern.items()},
        lora_dropout=dropout, target_modules="|".join(map(re.escape, ranks)),  # as an expression: names in a list match others' ends too
    )  # fmt: skip
    model.add_adapter(config)
    for name, parameter in lora_parameters(model).items():
        parameter.set_dtype(ms.float32)
        parameter.set_data(ms.Tensor(part[name] / np.float32(scale) if ".lora_B." in name else part[name]))
    _compute_in(model, compute)
