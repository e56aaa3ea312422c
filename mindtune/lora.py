"""LoRA: where it goes, how it starts, and the file in which it travels.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). The file layout is diffusers':
`transformer.<module>.lora_A.weight`, `text_encoder.<module>.lora_B.weight` ..., rank, alpha and targets as JSON in the header.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindtune.cli import UserError
from mindtune.models import BaseTunerLayer, LoraConfig
from mindtune.precision import NUMPY_TYPES
from mindtune.rng import normal

LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def check_targets(model: nn.Cell, targets: Iterable[str], flag: str) -> None:
    """Every target ends the name of some linear layer of `model`. Raises UserError offering near names."""
    names = [name for name, cell in model.cells_and_names() if isinstance(cell, nn.Dense)]
    suffixes = sorted({".".join(name.split(".")[-n:]) for name in names for n in (1, 2)} - {"0", "2"})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, suffixes, n=4, cutoff=0.5) or suffixes
            raise UserError(f"{flag} {target}: no linear layer has that name. Near names: {', '.join(near)}.")


def add_lora(model: nn.Cell, rank: int, alpha: float, dropout: float, targets: list[str], compute: ms.Type) -> None:
    """Injects trainable low-rank layers beside the targets; they compute in `compute`, whatever they are stored in."""
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=list(targets))
    )
    _compute_in(model, compute)


def _compute_in(model: nn.Cell, compute: ms.Type) -> None:
    """float32 low-rank layers in a half-precision model do their products in its type."""
    if compute != ms.float32:
        for _, cell in model.cells_and_names():
            if isinstance(cell, BaseTunerLayer):
                for layer in (*cell.lora_A.values(), *cell.lora_B.values()):
                    layer.to_float(compute)


def init_lora(model: nn.Cell, rank: int, seed: int) -> None:
    """A ~ N(0, 1/rank), B = 0, as peft's "gaussian", but drawn by name, so that depth or order change no layer's start."""
    for name, parameter in lora_parameters(model).items():
        value = normal(seed, f"lora/{name}", shape=parameter.shape) / rank if ".lora_A." in name else np.zeros(parameter.shape)
        parameter.set_data(ms.Tensor(value.astype(np.float32), parameter.dtype))


def lora_parameters(model: nn.Cell) -> dict[str, ms.Parameter]:
    """LoRA parameters by their name in the file, without prefix: `<module>.lora_A.weight`."""
    return {name.replace(".default.", "."): p for name, p in model.parameters_and_names() if ".lora_A." in name or ".lora_B." in name}


def enable_lora(model: nn.Cell, enabled: bool) -> None:
    """Switches the adapter on or off for PyNative calls (a compiled graph keeps what it was compiled with)."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, BaseTunerLayer):
            cell._disable_adapters = not enabled


def save_lora(path: Path, models: dict[str, nn.Cell], rank: int, alpha: float, targets: dict[str, list[str]], dtype: ms.Type) -> None:
    """Writes the adapters of `models` (prefix -> cell) to one file in `dtype`.

    When alpha differs from rank, alpha / rank is multiplied into B and the header says alpha = rank: tools that ignore the header
    run an adapter at alpha = rank, and `.alpha` entries are refused by those that read it.
    """
    tensors, metadata = {}, {}
    for prefix, model in models.items():
        for name, parameter in lora_parameters(model).items():
            value = parameter.asnumpy()
            if ".lora_B." in name:
                value = value * np.float32(alpha / rank)
            tensors[f"{prefix}.{name}"] = value.astype(NUMPY_TYPES[dtype])
        # diffusers makes its LoraConfig of these and looks into both patterns.
        settings = {"r": rank, "lora_alpha": rank, "target_modules": targets[prefix], "rank_pattern": {}, "alpha_pattern": {}}
        metadata.update({f"{prefix}.{name}": value for name, value in settings.items()})
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata), "trained_lora_alpha": str(alpha)}
    path.write_bytes(_with_header(save(tensors), header))


def _with_header(file: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with `metadata` in this order: the library writes it in another order every time, and equal runs shall
    leave equal bytes. Layout: length of the JSON header (8 bytes), the header padded to 8 bytes, the data."""
    length = int.from_bytes(file[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(file[8 : 8 + length])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + length :]


def load_lora(path: Path, models: dict[str, nn.Cell], compute: ms.Type, flag: str = "--lora", scale: float = 1.0) -> None:
    """Injects the adapter of a file into `models` (prefix -> cell) for inference; scale * alpha / rank is multiplied into B.

    Raises UserError if the file is no LoRA, has nothing for `models`, or names layers or widths that a model does not have.
    """
    tensors, alphas = read_lora(path, flag)
    if not any(k.startswith(f"{prefix}.") for k in tensors for prefix in models):
        raise UserError(f"{flag} {path}: made for another model; it adapts {min(tensors).split('.')[0]}, not {' or '.join(models)}.")
    for prefix, model in models.items():
        own = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        ranks = {k[: -len(".lora_A.weight")]: v.shape[0] for k, v in own.items() if k.endswith(".lora_A.weight")}
        if not ranks:
            continue
        cells = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, nn.Dense)}
        if foreign := sorted(set(ranks) - set(cells)):
            raise UserError(f"{flag} {path}: made for another model; this {prefix} has no layer {foreign[0]}.")
        for name, rank in ranks.items():
            found = [own[k].shape if (k := f"{name}.lora_{half}.weight") in own else "nothing" for half in "AB"]
            if found != [(rank, cells[name].in_channels), (cells[name].out_channels, rank)]:
                raise UserError(
                    f"{flag} {path}: made for another model; A and B of {name} are {found[0]} and {found[1]}, the layer of this "
                    f"{prefix} takes {cells[name].in_channels} and gives {cells[name].out_channels}."
                )
        common = max(set(ranks.values()), key=list(ranks.values()).count)
        pattern = {name: rank for name, rank in ranks.items() if rank != common}
        config = LoraConfig(r=common, lora_alpha=common, target_modules=sorted(ranks), rank_pattern=pattern, alpha_pattern=dict(pattern))
        model.add_adapter(config)
        for name, parameter in lora_parameters(model).items():
            value = own[name].astype(np.float32)
            module = name.rsplit(".lora_", 1)[0]
            if ".lora_B." in name:
                value = value * np.float32(scale * alphas.get(f"{prefix}.{module}", ranks[module]) / ranks[module])
            parameter.set_dtype(ms.float32)
            parameter.set_data(ms.Tensor(value))
            parameter.requires_grad = False
        _compute_in(model, compute)


def read_lora(path: Path, flag: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Tensors of a LoRA file by name and alpha by module: from `.alpha` entries, else from the header, else absent (= rank)."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {path}: cannot be read as safetensors ({error}).") from None
    weights = {k: v for k, v in tensors.items() if k.endswith((".lora_A.weight", ".lora_B.weight"))}
    if not weights:
        raise UserError(f"{flag} {path}: holds no lora_A/lora_B weights. Give a LoRA in diffusers' layout.")
    alphas = {k[: -len(".alpha")]: float(v) for k, v in tensors.items() if k.endswith(".alpha")}
    settings = json.loads(header.get("lora_adapter_metadata", "{}"))
    for name in weights:
        module, prefix = name.rsplit(".lora_", 1)[0], name.split(".")[0]
        patterns = settings.get(f"{prefix}.alpha_pattern") or {}  # as peft reads it: whole names or their ends
        own = next((alpha for key, alpha in patterns.items() if re.search(rf"\.{key}$", module)), settings.get(f"{prefix}.lora_alpha"))
        if own is not None:
            alphas.setdefault(module, float(own))
    return weights, alphas
