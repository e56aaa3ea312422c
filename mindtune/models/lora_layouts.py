"""The tensors of a FLUX LoRA in the layouts of other tools: read from any that `lora_names` knows, written in three of them.

    diffusers   transformer.<layer>.lora_A.weight, .lora_B.weight               text_encoder.<layer of CLIP>...
    kohya       lora_unet_<native layer>.lora_down.weight, .lora_up.weight      lora_te1_<layer of CLIP>...       with _ for every dot
    comfyui     diffusion_model.<native layer>.lora_A.weight, .lora_B.weight    text_encoders.clip_l.transformer.<layer of CLIP>...

A (or down) is [rank, inputs], B (or up) [outputs, rank]; beside them may be `.alpha`, a number; the layer's weight changes by
alpha / rank * B A, and by B A without alpha. Native are the layers of Black Forest Labs' own model: there q, k and v are one weight, in
single blocks with the MLP's first layer below them, and `final_layer.adaLN_modulation.1` gives shift and scale, which `norm_out.linear`
gives as scale and shift. Layouts as read by sd-scripts `networks/lora_flux.py`, ComfyUI `comfy/lora.py` and `flux_to_diffusers` in
`comfy/utils.py`, and diffusers' `loaders/single_file_utils.py`. Pure NumPy; raises ValueError.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

import ml_dtypes
import numpy as np

from mindtune.models import lora_names
from mindtune.models.lora_names import NATIVE, SWAPPED

LAYOUTS = ("diffusers", "kohya", "comfyui")  # that are written
_A_ENDS = (".lora_A.weight", ".lora_down.weight")
_OTHER_FILE = "Give a LoRA of FLUX.1"
_FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
_KOHYA_PREFIXES = {"diffusion_model.": "lora_unet_", "text_encoders.clip_l.transformer.": "lora_te1_"}

# Layer in ComfyUI's layout -> the layers in diffusers' that it holds.
_PARTS = {
    f"diffusion_model.{native}": [f"transformer.{layer}" for layer in layers] for native, layers in NATIVE.items()
}
_PARTS.update({f"text_encoders.clip_l.transformer.{layer}": [f"text_encoder.{layer}"] for layer in lora_names.CLIP})
_NATIVE = {part: native for native, parts in _PARTS.items() for part in parts}


class _Lora(NamedTuple):
    a: np.ndarray  # [rank, inputs]
    b: np.ndarray  # [outputs, rank]
    scale: float  # alpha / rank


def _kohya_name(native: str) -> str:
    prefix = next(prefix for prefix in _KOHYA_PREFIXES if native.startswith(prefix))
    return _KOHYA_PREFIXES[prefix] + native[len(prefix) :].replace(".", "_")


def ranks(tensors: dict[str, np.ndarray]) -> dict[str, int]:
    """The rank of every layer that the tensors adapt, in a layout that is written."""
    return {name[: -len(end)]: a.shape[0] for name, a in tensors.items() for end in _A_ENDS if name.endswith(end)}


def to_diffusers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in diffusers' layout, from any of `lora_names.LAYOUTS_READ`. `.alpha` is left out where it is the rank.

    Of a native weight that holds several layers, a layer gets its block, if B consists of equal blocks on the diagonal, without the
    columns that only fill it up: those that are zero in A and B. Any other B gives a layer all columns in which its own rows are not
    all zero, with their rows of A. A layer that is left with no column was not adapted. (An adapter that was never trained has a B of
    zeros, so it counts as blocks; where its rank does not divide, each layer gets all of A.) Weights of 8 bits become float16, which
    holds every value that they can have.

    Raises ValueError for another kind of file, a layer that FLUX does not have, and for shapes and values that cannot be.
    """
    loras, origin = {}, {}
    for module, entry in lora_names.modules(tensors).items():
        model, names, swapped = lora_names.where(module)
        lora = _lora(module, {role: tensors[name] for role, name in entry.items()})
        parts = _split(module, lora, len(names)) if len(names) > 1 else [_swap(lora) if swapped else lora]
        for layer in (f"{model}.{name}" for name in names):
            if layer in origin:
                raise ValueError(f"{origin[layer]} and {module} both adapt {layer}. Keep one of them")
            origin[layer] = module
        loras.update({f"{model}.{name}": part for name, part in zip(names, parts) if part is not None})
    return _tensors(loras, "lora_A", "lora_B", every_alpha=False)


def from_diffusers(tensors: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Tensors in diffusers' layout as `layout` has them: the inverse of `to_diffusers`, with `.alpha` for every layer.

    A native weight that holds several layers gets A = [A_q; A_k; ...] and a block-diagonal B, or, if all its layers share one A, that
    A and B = [B_q; B_k; ...]. The blocks are equal, filled up with zeros to the largest rank among them, also for layers that are not
    adapted: sd-scripts and diffusers cut them so. Alpha grows with the rank, so that alpha / rank stays; where that differs among the
    layers it goes into B.

    Raises ValueError for a layer that the layout has no name for, and for shapes that cannot be.
    """
    if layout == "diffusers":
        return tensors
    groups: dict[str, dict[str, _Lora]] = {}
    for module, entry in lora_names.modules(tensors).items():
        lora = _lora(module, {role: tensors[name] for role, name in entry.items()})
        template, number = _template(module)
        if template not in _NATIVE:
            raise ValueError(f"{layout}'s layout has no name for the layer {module}. {_OTHER_FILE}")
        groups.setdefault(_NATIVE[template].replace("#", number), {})[template] = lora
    loras = {}
    for native, found in groups.items():
        template = _template(native)[0]
        parts = [found.get(part) for part in _PARTS[template]]
        lora = _fuse(native, parts) if len(parts) > 1 else parts[0]
        loras[native] = _swap(lora) if template == f"diffusion_model.{SWAPPED}" else lora
    if layout == "kohya":
        return _tensors(
            {_kohya_name(native): lora for native, lora in loras.items()}, "lora_down", "lora_up", every_alpha=True
        )
    return _tensors(loras, "lora_A", "lora_B", every_alpha=True)


def _lora(module: str, entry: dict[str, np.ndarray]) -> _Lora:
    shapes = [entry[role].shape if role in entry else "nothing" for role in "ab"]
    if "nothing" in shapes or [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
        raise ValueError(
            f"A and B of {module} are {shapes[0]} and {shapes[1]}, which is no LoRA of a linear layer. {_OTHER_FILE}"
        )
    if 0 in shapes[0] + shapes[1]:
        raise ValueError(f"A and B of {module} are {shapes[0]} and {shapes[1]}: empty. {_OTHER_FILE}")
    a, b = (_float(f"{role.upper()} of {module}", entry[role]) for role in "ab")
    return _Lora(a, b, _alpha(module, entry["alpha"]) / a.shape[0] if "alpha" in entry else 1.0)


def _float(what: str, value: np.ndarray) -> np.ndarray:
    if value.dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        value = value.astype(np.float16)
    if value.dtype not in _FLOATS:
        raise ValueError(
            f"{what} is stored as {value.dtype}, not as floating point: quantised LoRAs are not read. {_OTHER_FILE}"
        )
    if not np.isfinite(value).all():
        raise ValueError(f"{what} holds NaN or infinity: the file is damaged, or its training failed. {_OTHER_FILE}")
    return value


def _alpha(module: str, value: np.ndarray) -> float:
    """One number, whatever its shape."""
    values = np.unique(value.astype(np.float64))
    if values.size != 1 or not np.isfinite(values[0]):
        raise ValueError(f"alpha of {module} is {value.tolist()}, expected one finite number. {_OTHER_FILE}")
    return float(values[0])


def _tensors(loras: dict[str, _Lora], a: str, b: str, every_alpha: bool) -> dict[str, np.ndarray]:
    out = {}
    for module, lora in loras.items():
        out[f"{module}.{a}.weight"], out[f"{module}.{b}.weight"] = lora.a, lora.b
        if every_alpha or lora.scale != 1.0:
            out[f"{module}.alpha"] = np.array(lora.scale * lora.a.shape[0], np.float32)
    return out


def _template(module: str) -> tuple[str, str]:
    """The name with # for its block's number, and that number."""
    number = re.search(r"(?<=blocks[._]|layers[._])\d+(?=[._])", module)
    return (module[: number.start()] + "#" + module[number.end() :], number[0]) if number else (module, "")


def _rows(count: int, inputs: int) -> list[int]:
    """Outputs of the layers in one native weight: q, k and v are as wide as their input, the MLP is four times as wide."""
    return [inputs, inputs, inputs, 4 * inputs][:count]


def _fuse(native: str, parts: list[Optional[_Lora]]) -> _Lora:
    found = [part for part in parts if part is not None]
    inputs = found[0].a.shape[1]
    rows = _rows(len(parts), inputs)
    for part, outputs in zip(parts, rows):
        if part is not None and (part.a.shape[1], part.b.shape[0]) != (inputs, outputs):
            raise ValueError(
                f"A and B of a layer in {native} are {part.a.shape} and {part.b.shape}, expected {inputs} -> {outputs}. {_OTHER_FILE}"
            )
    scale = found[0].scale
    if any(part.scale != scale for part in found):
        parts = [part and part._replace(b=(part.b * np.float32(part.scale)).astype(part.b.dtype)) for part in parts]
        scale = 1.0
    if all(part is not None and np.array_equal(part.a, found[0].a) for part in parts):
        return _Lora(found[0].a, np.concatenate([part.b for part in parts]), scale)
    block = max(part.a.shape[0] for part in found)
    a = np.zeros((block * len(parts), inputs), found[0].a.dtype)
    b = np.zeros((sum(rows), block * len(parts)), found[0].b.dtype)
    for number, part in enumerate(parts):
        if part is not None:
            columns = slice(block * number, block * number + part.a.shape[0])
            a[columns] = part.a
            b[sum(rows[:number]) : sum(rows[: number + 1]), columns] = part.b
    return _Lora(a, b, scale)


def _split(module: str, lora: _Lora, count: int) -> list[Optional[_Lora]]:
    (rank, inputs), rows = lora.a.shape, _rows(count, lora.a.shape[1])
    if lora.b.shape[0] != sum(rows):
        raise ValueError(
            f"B of {module} has {lora.b.shape[0]} rows, expected {sum(rows)} for {inputs} inputs. {_OTHER_FILE}"
        )
    pieces = np.split(lora.b, np.cumsum(rows)[:-1])
    used = np.array([np.any(piece != 0, axis=0) for piece in pieces])
    blocks = np.arange(rank) * count // rank == np.arange(count)[:, None]
    if rank % count == 0 and not np.any(used & ~blocks):
        used = blocks & (used | np.any(lora.a != 0, axis=1))
    elif not np.any(used):
        used[:] = True
    return [
        _Lora(lora.a[mask], piece[:, mask], lora.scale) if mask.any() else None for piece, mask in zip(pieces, used)
    ]


def _swap(lora: _Lora) -> _Lora:
    """The two halves of the outputs, exchanged."""
    half = lora.b.shape[0] // 2
    return lora._replace(b=np.concatenate([lora.b[half:], lora.b[:half]]))
