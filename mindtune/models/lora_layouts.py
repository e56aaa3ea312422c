"""Converts the tensors of a FLUX LoRA between layouts: from any layout in `lora_names`, to the four below.

    diffusers   transformer.<layer>.lora_A.weight, .lora_B.weight               text_encoder.<layer of CLIP>...
    kohya       lora_unet_<native layer>.lora_down.weight, .lora_up.weight      lora_te1_<layer of CLIP>...   (_ for .)
    comfyui     diffusion_model.<native layer>.lora_A.weight, .lora_B.weight    text_encoders.clip_l.transformer.<layer>
    lycoris     lycoris_<layer>.lokr_w1, .lokr_w2 or .lokr_w2_a, .lokr_w2_b     lora_te1_<layer of CLIP>...   (_ for .)

The first three are of LoRA, the last of LoKr (see `lokr`). Only diffusers' holds a DoRA, which also has
`<layer>.lora_magnitude_vector` [outputs], the norms of the rows of the adapted weight. Control-LoRAs may have trained
norms of q and k, and biases of B, `<layer>.lora_B.bias` [outputs], which change the layer's bias by alpha / rank.

A (or down) is [rank, inputs] and B (or up) is [outputs, rank]. A file may also have a number `.alpha` per layer. The
layer's weight changes by alpha / rank * B A, or by B A without alpha. "Native" layers are those of Black Forest Labs'
own model. In it q, k and v are one weight; in single blocks the first layer of the MLP follows in the same weight. Its
`final_layer.adaLN_modulation.1` outputs shift and scale, diffusers' `norm_out.linear` scale and shift.

Sources of the layouts: sd-scripts `networks/lora_flux.py`, ComfyUI `comfy/lora.py` and `flux_to_diffusers` in
`comfy/utils.py`, diffusers' `loaders/single_file_utils.py`, and LyCORIS' `modules/lokr.py`. Pure NumPy; raises
ValueError.
"""

from __future__ import annotations

import re
from typing import Optional

import ml_dtypes
import numpy as np

from mindtune.models import flux_layer_names, lokr, lora_names
from mindtune.models.flux_layer_names import NATIVE_LAYERS, SWAPPED_LAYER
from mindtune.models.fused_lora import ADVICE, Lora, fuse, split, swap_halves

LAYOUTS = ("diffusers", "kohya", "comfyui", "lycoris")  # that can be written
# Kind of adapter -> its name in messages, and the layouts that hold it.
KINDS = {"lora": ("LoRA", LAYOUTS[:3]), "dora": ("DoRA", LAYOUTS[:1]), "lokr": ("LoKr", LAYOUTS[3:])}
_MAGNITUDE = ".lora_magnitude_vector"
NORM = re.compile(r"\.norm_(added_)?[qk]\.weight$")  # a trained norm of a Control-LoRA, as diffusers names it
BIAS = ".lora_B.bias"
_A_ENDINGS = (".lora_A.weight", ".lora_down.weight")
_FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
_KOHYA_PREFIXES = {"diffusion_model.": "lora_unet_", "text_encoders.clip_l.transformer.": "lora_te1_"}

# Layer in ComfyUI's layout -> the layers in diffusers' layout that it contains.
_CONTAINED = {
    f"diffusion_model.{native}": [f"transformer.{layer}" for layer in layers]
    for native, layers in NATIVE_LAYERS.items()
}
_CONTAINED.update(
    {f"text_encoders.clip_l.transformer.{layer}": [f"text_encoder.{layer}"] for layer in flux_layer_names.CLIP_LAYERS}
)
_CONTAINER = {layer: native for native, layers in _CONTAINED.items() for layer in layers}


def _kohya_name(native: str) -> str:
    """Kohya's name of a layer in ComfyUI's layout."""
    prefix = next(prefix for prefix in _KOHYA_PREFIXES if native.startswith(prefix))
    return _KOHYA_PREFIXES[prefix] + native[len(prefix) :].replace(".", "_")


def ranks(tensors: dict[str, np.ndarray]) -> dict[str, int]:
    """The rank of every adapted layer, for tensors in one of `LAYOUTS`."""
    return {name[: -len(end)]: a.shape[0] for name, a in tensors.items() for end in _A_ENDINGS if name.endswith(end)}


def norms(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The trained norms among the tensors of a file or of an adapter."""
    return {name: value for name, value in tensors.items() if NORM.search(name)}


def foreign_norm(adapter: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> Optional[str]:
    """Name and shape of a trained norm of an adapter that is none of the model's parameters; None if there is none."""
    wrong = (f"{name} {value.shape}" for name, value in norms(adapter).items() if value.shape != shapes.get(name))
    return next(wrong, None)


def kind(tensors: dict[str, np.ndarray]) -> str:
    """The key in `KINDS` of an adapter in one of `LAYOUTS`. Raises ValueError if its layers are of several kinds."""
    kinds = {"lokr" if ".lokr_" in name else "lora" for name in tensors if not name.endswith(".alpha")}
    magnitudes = sum(name.endswith(_MAGNITUDE) for name in tensors)
    if len(kinds) > 1 or magnitudes not in (0, len(ranks(tensors))):
        raise ValueError("mixes LoRA, DoRA and LoKr. Give a file in which all layers have the same adapter")
    return "dora" if magnitudes else kinds.pop() if kinds else "lora"


def to_diffusers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts tensors from any of `lora_names.LAYOUTS_READ` to diffusers' layout. Omits `.alpha` where it is the rank.

    A native weight that contains several layers is split. If B consists of equal blocks on the diagonal, each layer
    gets its block without padding columns, which are zero in A and in B. Otherwise each layer gets the columns in which
    its rows of B are not all zero, and the matching rows of A. A layer without columns is not adapted. (An untrained
    adapter has a B of zeros, so it counts as blocks; if its rank is not divisible, each layer gets all of A.) 8-bit
    weights become float16, which represents all of their values. The scale of a LoKr is multiplied into w1. Trained
    norms get diffusers' names.

    Raises ValueError for another type of file, for a layer that FLUX does not have, and for invalid shapes and values.
    """
    loras, lokrs, adapted_by = {}, {}, {}
    norms = {name: found for name in tensors if (found := flux_layer_names.norm_name(name))}
    for module, entries in lora_names.modules([name for name in tensors if name not in norms] or norms).items():
        model, layers, swapped = flux_layer_names.resolve(module)
        values = {role: tensors[name] for role, name in entries.items()}
        if (len(layers) > 1 or swapped) and not values.keys() <= {"a", "b", "alpha", "bias"}:
            raise ValueError(
                f"{module} is a DoRA or LoKr of a weight that diffusers divides or reorders ({', '.join(layers)}), "
                "which is not supported. Give one that was trained with diffusers' layers"
            )
        if any(role.startswith("w") for role in values):
            layer = f"{model}.{layers[0]}"
            if layer in adapted_by:
                raise ValueError(f"{adapted_by[layer]} and {module} both adapt {layer}. Keep one of them")
            adapted_by[layer] = module
            lokrs.update({f"{layer}.{name}": value for name, value in _make_lokr(module, values).items()})
            continue
        lora = _make_lora(module, values)
        parts = split(module, lora, len(layers)) if len(layers) > 1 else [swap_halves(lora) if swapped else lora]
        for name in (f"{model}.{layer}" for layer in layers):
            if name in adapted_by:
                raise ValueError(f"{adapted_by[name]} and {module} both adapt {name}. Keep one of them")
            adapted_by[name] = module
        loras.update({f"{model}.{layer}": part for layer, part in zip(layers, parts) if part is not None})
    found = {**_to_tensors(loras, "lora_A", "lora_B", every_alpha=False), **lokrs}
    kind(found)
    return {**found, **{norms[name]: _as_float(name, tensors[name]) for name in norms}}


def from_diffusers(tensors: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Converts tensors from diffusers' layout to `layout`, with `.alpha` for every layer. Inverts `to_diffusers`.

    A native weight that contains several layers gets A = [A_q; A_k; ...] and a block-diagonal B, or, if all of its
    layers share one A, that A and B = [B_q; B_k; ...]. All blocks are padded with zeros to the largest rank, and layers
    that are not adapted get a block too, because sd-scripts and diffusers split them into equal blocks. Alpha grows
    with the rank, so alpha / rank stays the same; if that differs between the layers, it is multiplied into B.

    A LoKr keeps its factors. Raises ValueError for an adapter that the layout does not hold, for a layer that it has no
    name for, and for invalid shapes.
    """
    name, layouts = KINDS[kind(tensors)]
    if layout not in layouts:
        raise ValueError(f"is a {name}, which the layout {layout} does not hold. Write it as {' or '.join(layouts)}")
    if layout == "diffusers":
        return tensors
    if further := norms(tensors):
        raise ValueError(
            f"has trained norms ({min(further)}), which the layout {layout} does not hold. Write it as diffusers"
        )
    if layout == "lycoris":
        return lokr.to_lycoris(tensors)
    groups: dict[str, dict[str, Lora]] = {}
    for module, entries in lora_names.modules(tensors).items():
        lora = _make_lora(module, {role: tensors[name] for role, name in entries.items()})
        template, number = _template(module)
        if template not in _CONTAINER:
            raise ValueError(f"{layout}'s layout has no name for the layer {module}. {ADVICE}")
        groups.setdefault(_CONTAINER[template].replace("#", number), {})[template] = lora
    loras = {}
    for native, found in groups.items():
        template = _template(native)[0]
        parts = [found.get(layer) for layer in _CONTAINED[template]]
        lora = fuse(native, parts) if len(parts) > 1 else parts[0]
        loras[native] = swap_halves(lora) if template == f"diffusion_model.{SWAPPED_LAYER}" else lora
    if layout == "kohya":
        loras = {_kohya_name(native): lora for native, lora in loras.items()}
        return _to_tensors(loras, "lora_down", "lora_up", every_alpha=True)
    return _to_tensors(loras, "lora_A", "lora_B", every_alpha=True)


def _make_lora(module: str, entries: dict[str, np.ndarray]) -> Lora:
    """Checks the entries "a", "b" and perhaps "alpha", "magnitude" or "bias" of one layer."""
    shapes = [entries[role].shape if role in entries else "nothing" for role in "ab"]
    if "nothing" in shapes or [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
        raise ValueError(
            f"A and B of {module} are {shapes[0]} and {shapes[1]}, which is not a LoRA of a linear layer. {ADVICE}"
        )
    if 0 in shapes[0] + shapes[1]:
        raise ValueError(f"A and B of {module} are {shapes[0]} and {shapes[1]}: empty. {ADVICE}")
    a, b = (_as_float(f"{role.upper()} of {module}", entries[role]) for role in "ab")
    scale = _alpha(module, entries["alpha"]) / a.shape[0] if "alpha" in entries else 1.0
    if "bias" in entries:
        bias = _as_float(f"bias of {module}", entries["bias"])
        if bias.shape != b.shape[:1] or "magnitude" in entries:
            raise ValueError(f"bias of {module} is {bias.shape}, expected {b.shape[:1]} and no DoRA. {ADVICE}")
        return Lora(a, b, scale, bias=bias)
    if "magnitude" not in entries:
        return Lora(a, b, scale)
    magnitude = _as_float(f"lora_magnitude_vector of {module}", entries["magnitude"])
    if magnitude.size != b.shape[0]:
        raise ValueError(f"lora_magnitude_vector of {module} is {magnitude.shape}, expected {b.shape[:1]}. {ADVICE}")
    return Lora(a, b, scale, magnitude.reshape(-1))


def _make_lokr(module: str, entries: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The factors of one layer by their names in LyCORIS, the scale multiplied into w1."""
    if "alpha" not in entries:
        raise ValueError(f"{module} has no alpha, so its scale is unknown. Give a LoKr in the layout of LyCORIS")
    factors = {
        f"lokr_{role}": _as_float(f"lokr_{role} of {module}", value)
        for role, value in entries.items()
        if role != "alpha"
    }
    try:
        return lokr.with_scale(factors, _alpha(module, entries["alpha"]))
    except ValueError as error:
        raise ValueError(f"{module} has {error}. {ADVICE}") from None


def _as_float(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        value = value.astype(np.float16)
    if value.dtype not in _FLOATS:
        raise ValueError(
            f"{name} is stored as {value.dtype}, not as floating point: quantised LoRAs are not supported. {ADVICE}"
        )
    if not np.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinity: the file is damaged, or its training failed. {ADVICE}")
    return value


def _alpha(module: str, value: np.ndarray) -> float:
    """The value of an `.alpha` entry: one number in an array of any shape."""
    values = np.unique(value.astype(np.float64))
    if values.size != 1 or not np.isfinite(values[0]):
        raise ValueError(f"alpha of {module} is {value.tolist()}, expected one finite number. {ADVICE}")
    return float(values[0])


def _to_tensors(loras: dict[str, Lora], a: str, b: str, every_alpha: bool) -> dict[str, np.ndarray]:
    """Names the tensors; `a` and `b` are the layout's names of the two halves."""
    tensors = {}
    for module, lora in loras.items():
        tensors[f"{module}.{a}.weight"] = lora.a
        tensors[f"{module}.{b}.weight"] = lora.b
        if lora.magnitude is not None:
            tensors[f"{module}{_MAGNITUDE}"] = lora.magnitude
        if lora.bias is not None:
            tensors[f"{module}{BIAS}"] = lora.bias
        if every_alpha or lora.scale != 1.0:
            tensors[f"{module}.alpha"] = np.array(lora.scale * lora.a.shape[0], np.float32)
    return tensors


def _template(module: str) -> tuple[str, str]:
    """The name with # in place of its block number, and that number (empty without a block)."""
    number = re.search(r"(?<=blocks[._]|layers[._])\d+(?=[._])", module)
    return (module[: number.start()] + "#" + module[number.end() :], number[0]) if number else (module, "")
