"""Reads, writes and checks the files of LoRA, DoRA and LoKr adapters. Needs no model.

Files are written in diffusers' layout: `transformer.<layer>.lora_A.weight`, `text_encoder.<layer>.lora_B.weight` ...,
with rank, alpha and targets as JSON in the header, and LoKr in LyCORIS' layout. The other layouts of `lora_layouts` can
be written too, and those of `lora_names` can be read.

Here an adapter is a dict of the tensors for one model, `<layer>.lora_A.weight`, `<layer>.lora_B.weight` and, of a DoRA,
`<layer>.lora_magnitude_vector`, or `<layer>.lokr_w1` and the other factors of a LoKr. A Control-LoRA may also have
`<norm>.weight`, trained norms of q and k, and `<layer>.lora_B.bias`. `adapters` maps the prefix of a model
(transformer, text_encoder) to its adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
from safetensors.numpy import save

from mindtune.cli import UserError
from mindtune.models import lora_layouts, lora_names
from mindtune.models.precision import NUMPY_DTYPES
from mindtune.models.safetensors_file import read_safetensors
from mindtune.models.weights import PICKLED

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
KEPT = re.compile(r"\.(alpha|lora_magnitude_vector|norm_(added_)?[qk]\.weight)$")  # tensors that stay float32
_ADVICE = {"x_embedder": " Only examples/flux_control/ trains Control-LoRAs, with --fill those of fill models."}


def most_common(values: Iterable) -> Any:
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]


def rank_and_pattern(ranks: dict[str, int]) -> tuple[int, dict[str, int]]:
    """peft's `r` and `rank_pattern` for the rank of every layer.

    A key of the pattern also applies to longer names that end in it. The name of FLUX's last layer, proj_out, is the
    end of other names, so its rank must be `r`.
    """
    default = ranks.get("proj_out", most_common(ranks.values()))
    return default, {layer: rank for layer, rank in sorted(ranks.items()) if rank != default}


def describe_adapters(adapters: dict[str, dict[str, np.ndarray]]) -> str:
    """A summary such as "transformer: 190 layers of rank 16"."""
    return "; ".join(f"{prefix}: {describe(adapter)}" for prefix, adapter in adapters.items())


def describe(tensors: dict[str, np.ndarray]) -> str:
    """A summary such as "190 layers of rank 4, 16", "DoRA, 190 layers of rank 4" or "LoKr, 190 layers"."""
    kind, ranks = lora_layouts.kind(tensors), lora_layouts.ranks(tensors)
    if kind == "lokr":
        return f"LoKr, {sum(name.endswith('.lokr_w1') for name in tensors)} layers"
    summary = f"{len(ranks)} layers of rank {', '.join(map(str, sorted(set(ranks.values()))))}"
    summary += f", {count} norms" if (count := len(lora_layouts.norms(tensors))) else ""
    return f"DoRA, {summary}" if kind == "dora" else summary


# ---- writing -------------------------------------------------------------------------------------


def write_lora(
    path: Path, tensors: dict[str, np.ndarray], alphas: dict[str, float], layout: str, dtype: Optional[ms.Type] = None
) -> str:
    """Writes the tensors and alphas that `read_lora` returns in one of `lora_layouts.LAYOUTS`.

    `dtype` None keeps the dtypes. In diffusers' layout alpha / rank is multiplied into B, and the header has alpha =
    rank: tools that ignore the header use alpha = rank, and those that read it reject `.alpha` entries. The other
    layouts have `.alpha` entries. Magnitudes stay float32: in half precision they would lose what training changed.
    Returns a summary of the file, see `describe`. Raises ValueError for an adapter that the layout does not hold, and
    for a layer that it has no name for.
    """
    if layout == "diffusers" and lora_layouts.kind(tensors) != "lokr":
        header = {
            "lora_adapter_metadata": json.dumps(_lora_config(tensors)),
            "trained_lora_alpha": str(most_common(alphas.values())),
        }
        scaled = _multiply_scale_into_b(tensors, alphas)
        if dtype is None:
            scaled = {name: value.astype(tensors[name].dtype) for name, value in scaled.items()}
        tensors = scaled
    else:
        entries = {f"{layer}.alpha": np.array(alpha, np.float32) for layer, alpha in alphas.items()}
        tensors = lora_layouts.from_diffusers({**tensors, **entries}, layout)
        header = _kohya_header(tensors) if layout == "kohya" else {}
    if dtype is not None:
        tensors = {
            name: value if KEPT.search(name) else value.astype(NUMPY_DTYPES[dtype]) for name, value in tensors.items()
        }
    path.write_bytes(_with_metadata(save(tensors), {"format": "pt", **header}))
    return describe(tensors)


def _kohya_header(tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """The metadata of sd-scripts. Its resizing tool also writes Dynamic if the layers differ."""
    dims = set(lora_layouts.ranks(tensors).values())
    alphas = {float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    return {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(dims.pop()) if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def _lora_config(tensors: dict[str, np.ndarray]) -> dict:
    """The items from which diffusers makes its LoraConfig, each with the prefix of its model."""
    dora = {"use_dora": True} if lora_layouts.kind(tensors) == "dora" else {}
    by_prefix: dict[str, dict[str, int]] = {}
    for name, rank in lora_layouts.ranks(tensors).items():
        prefix, _, layer = name.partition(".")
        by_prefix.setdefault(prefix, {})[layer] = rank
    config = {}
    for prefix, ranks in by_prefix.items():
        rank, pattern = rank_and_pattern(ranks)
        items = {
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(ranks),
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            **dora,
        }
        config.update({f"{prefix}.{key}": value for key, value in items.items()})
    return config


def _multiply_scale_into_b(tensors: dict[str, np.ndarray], alphas: dict[str, float]) -> dict[str, np.ndarray]:
    """The tensors with alpha / rank multiplied into B and its bias. Where that is not 1, they become float32."""
    ranks, scaled = lora_layouts.ranks(tensors), dict(tensors)
    for layer, alpha in alphas.items():
        for name in {f"{layer}.lora_B.weight", layer + lora_layouts.BIAS} & tensors.keys():
            if alpha != ranks[layer]:
                scaled[name] = tensors[name].astype(np.float32) * np.float32(alpha / ranks[layer])
    return scaled


def _with_metadata(file: bytes, metadata: dict[str, str]) -> bytes:
    """Adds `metadata` to a safetensors file, in this order, so that equal runs write equal bytes.

    The safetensors library writes metadata in a different order every time. The layout of a file: the length of the
    JSON header (8 bytes), the header padded to 8 bytes, the data.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(file[8 : 8 + length])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + length :]


# ---- reading -------------------------------------------------------------------------------------


def find_lora(name: str, flag: str) -> Path:
    """The path of a LoRA file: `name` itself, or the adapter in the directory of a run, a checkpoint, or peft.

    Raises UserError if there is none.
    """
    path = Path(name)
    if path.is_dir():
        path = path / (PEFT_FILE if (path / PEFT_FILE).is_file() and not (path / LORA_FILE).is_file() else LORA_FILE)
    if path.suffix in PICKLED:
        raise UserError(f"{flag} {path}: a pickle, which can run code and is not loaded. Give a .safetensors file.")
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file. Give a .safetensors file, or the directory of a training run.")
    return path


def read_lora(path: Path, flag: str, biases: bool = False) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The tensors of a LoRA file by diffusers' names, and the alpha of every layer but those of a LoKr.

    Alpha comes from the `.alpha` entries, otherwise from the file's LoRA config, otherwise it is the rank. The config
    is in the header of diffusers' files, and in adapter_config.json next to peft's. The arrays may be memory-mapped.
    Raises UserError, which says what the file is, unless it is a LoRA, DoRA or LoKr of FLUX.1 in one of
    `lora_names.LAYOUTS_READ`, and, without `biases`, if B has biases.
    """
    try:
        entries, header = read_safetensors(path)
        tensors = lora_layouts.to_diffusers(entries)
    except ValueError as error:
        raise UserError(f"{flag} {path}: {error}.") from None
    if not biases and (bias := next((name for name in tensors if name.endswith(lora_layouts.BIAS)), None)):
        advice = "Only generate images with it, or give a LoRA without biases (lora_bias=False in peft)"
        raise UserError(f"{flag} {path}: has biases ({bias}), which cannot be trained, edited or exported. {advice}.")
    config = {}
    if not any(name.endswith("alpha") for name in entries):
        config = _read_lora_config(path, header, lora_names.layout_of(entries), flag)
    try:
        return tensors, _alphas(tensors, config)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:  # a config of another shape
        raise UserError(f"{flag} {path}: its LoRA config cannot be used ({error}). Give a LoRA of FLUX.1.") from None


def read_adapters(path: Path, flag: str, biases: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """The adapters in a LoRA file, float32, with alpha / rank multiplied into B and its bias.

    Raises UserError as `read_lora` does.
    """
    adapters: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _multiply_scale_into_b(*read_lora(path, flag, biases)).items():
        prefix, _, tensor_name = name.partition(".")
        adapters.setdefault(prefix, {})[tensor_name] = value.astype(np.float32, order="C")
    return adapters


def _read_lora_config(path: Path, header: dict[str, str], layout: str, flag: str) -> dict:
    """peft's LoraConfig for a file, each key with the prefix of its model; empty if there is none."""
    peft_config = path.with_name(PEFT_CONFIG)
    try:
        if layout == "diffusers":
            return json.loads(header.get("lora_adapter_metadata", "{}"))
        if layout in ("peft", "bare") and peft_config.is_file():
            items = json.loads(peft_config.read_text(encoding="utf-8")).items()
            return {f"{prefix}.{key}": value for prefix in ("transformer", "text_encoder") for key, value in items}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{flag} {path}: its LoRA config cannot be read ({error}). Give a LoRA of FLUX.1.") from None
    return {}


def _alphas(tensors: dict[str, np.ndarray], config: dict) -> dict[str, float]:
    """The alpha of every layer. Removes `.alpha` entries from `tensors`.

    With use_rslora, where peft scales by alpha / sqrt(rank), the alpha that gives the same scale.
    """
    alphas = {}
    for name, rank in lora_layouts.ranks(tensors).items():
        prefix, _, layer = name.partition(".")
        patterns = config.get(f"{prefix}.alpha_pattern") or {}  # peft compares with whole names and with their ends
        matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        alphas[name] = float(next(matching, config.get(f"{prefix}.lora_alpha", rank)))
        if config.get(f"{prefix}.use_rslora"):
            alphas[name] *= math.sqrt(rank)
        if (entry := tensors.pop(f"{name}.alpha", None)) is not None:
            alphas[name] = float(entry.item())
        if not math.isfinite(alphas[name]):
            raise ValueError(f"alpha of {name} is {alphas[name]}")
    return alphas


# ---- checking ------------------------------------------------------------------------------------


def check_adapters(
    path: Path, flag: str, adapters: dict[str, dict[str, np.ndarray]], layers: dict[str, dict[str, tuple[int, int]]]
) -> None:
    """Raises UserError unless every adapted layer is in `layers` with its widths.

    `layers` maps prefix -> layer -> (inputs, outputs).
    """
    if unknown := sorted(set(adapters) - set(layers)):
        raise UserError(f"{flag} {path}: made for another model; it adapts {unknown[0]}, not {' or '.join(layers)}.")
    for prefix, adapter in adapters.items():
        for layer, tensors in by_layer(adapter).items():
            if layer not in layers[prefix]:
                raise UserError(f"{flag} {path}: made for another model; this {prefix} has no layer {layer}.")
            inputs, outputs = layers[prefix][layer]
            shapes = {end: value.shape for end, value in tensors.items() if value.ndim == 2}  # no magnitudes or biases
            if _widths(shapes) != (inputs, outputs):
                what = "A and B" if "lora_A.weight" in shapes else "the factors"
                raise UserError(
                    f"{flag} {path}: made for another model; {what} of {layer} are "
                    f"{' and '.join(map(str, shapes.values()))}, but the layer of this {prefix} has {inputs} inputs "
                    f"and {outputs} outputs.{_ADVICE.get(layer, '')}"
                )


def check_kind(path: Path, flag: str, adapters: dict[str, dict[str, np.ndarray]], kind: str) -> None:
    """Raises UserError unless the adapters are of the `kind` that --adapter names."""
    found = lora_layouts.kind({name: value for adapter in adapters.values() for name, value in adapter.items()})
    if found != kind:
        name = lora_layouts.KINDS[found][0]
        raise UserError(f"{flag} {path}: is a {name}, but --adapter is {kind}. Give --adapter {found}.")


def by_layer(adapter: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Layer -> ending of the name, such as lora_A.weight or lokr_w1 -> tensor. Without norms."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, value in adapter.items():
        if not lora_layouts.NORM.search(name):
            layer, end = re.fullmatch(r"(.+)\.(lo(?:ra|kr)_\w+(?:\.(?:weight|bias))?)", name).groups()
            layers.setdefault(layer, {})[end] = value
    return layers


def _widths(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """(inputs, outputs) of a layer whose adapter has tensors of these shapes, by the endings of their names."""
    if "lora_A.weight" in shapes:
        return shapes["lora_A.weight"][1], shapes["lora_B.weight"][0]
    (left, middle), whole = shapes["lokr_w1"], shapes.get("lokr_w2")
    right, last = whole or (shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1])
    return middle * last, left * right
