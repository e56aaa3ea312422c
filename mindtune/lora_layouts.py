"""The tensors of a FLUX LoRA in the three layouts that tools exchange: diffusers', kohya's sd-scripts' and ComfyUI's.

    diffusers   transformer.<layer>.lora_A.weight, .lora_B.weight               text_encoder.<layer of CLIP>...
    kohya       lora_unet_<native layer>.lora_down.weight, .lora_up.weight      lora_te1_<layer of CLIP>...       with _ for every dot
    comfyui     diffusion_model.<native layer>.lora_A.weight, .lora_B.weight    text_encoders.clip_l.transformer.<layer of CLIP>...

A (or down) is [rank, inputs], B (or up) [outputs, rank]; beside them may be `.alpha`, a number; the layer's weight changes by
alpha / rank * B A, and by B A without alpha. Native are the layers of Black Forest Labs' own model: there q, k and v are one
weight, in single blocks with the MLP's first layer below them, and `final_layer.adaLN_modulation.1` gives shift and scale, which
`norm_out.linear` gives as scale and shift. Layouts as read by sd-scripts `networks/lora_flux.py`, ComfyUI `comfy/lora.py` and
`flux_to_diffusers` in `comfy/utils.py`, and diffusers' `loaders/single_file_utils.py`. Pure NumPy; raises ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, Optional

import numpy as np

LAYOUTS = ("diffusers", "kohya", "comfyui")
_ROLES = {".lora_A.weight": "a", ".lora_down.weight": "a", ".lora_B.weight": "b", ".lora_up.weight": "b", ".alpha": "alpha"}
_KOHYA_PREFIXES = {"diffusion_model.": "lora_unet_", "text_encoders.clip_l.transformer.": "lora_te1_"}
_SWAPPED = "diffusion_model.final_layer.adaLN_modulation.1"


def _native_layers() -> dict[str, list[str]]:
    """Layer in ComfyUI's layout -> the layers in diffusers' that it holds, from its first row to its last; # for a block's number."""
    embed, double, single = "time_text_embed", "transformer_blocks.#", "single_transformer_blocks.#"
    table = {"img_in": ["x_embedder"], "txt_in": ["context_embedder"], "final_layer.linear": ["proj_out"]}
    table["final_layer.adaLN_modulation.1"] = ["norm_out.linear"]
    for native, ours in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder")):
        table[f"{native}.in_layer"], table[f"{native}.out_layer"] = [f"{embed}.{ours}.linear_1"], [f"{embed}.{ours}.linear_2"]
    streams = (("img", "to_{}", "to_out.0", "ff", "norm1"), ("txt", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"))
    for stream, projection, out, feed_forward, norm in streams:
        block = f"double_blocks.#.{stream}"
        table[f"{block}_attn.qkv"] = [f"{double}.attn.{projection.format(letter)}" for letter in "qkv"]
        table[f"{block}_attn.proj"] = [f"{double}.attn.{out}"]
        table[f"{block}_mlp.0"], table[f"{block}_mlp.2"] = [f"{double}.{feed_forward}.net.0.proj"], [f"{double}.{feed_forward}.net.2"]
        table[f"{block}_mod.lin"] = [f"{double}.{norm}.linear"]
    table["single_blocks.#.linear1"] = [f"{single}.attn.to_{letter}" for letter in "qkv"] + [f"{single}.proj_mlp"]
    table["single_blocks.#.linear2"] = [f"{single}.proj_out"]
    table["single_blocks.#.modulation.lin"] = [f"{single}.norm.linear"]
    table = {f"diffusion_model.{native}": [f"transformer.{name}" for name in ours] for native, ours in table.items()}
    for name in [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]:
        layer = f"text_model.encoder.layers.#.{name}"
        table[f"text_encoders.clip_l.transformer.{layer}"] = [f"text_encoder.{layer}"]
    return table


def _kohya_name(native: str) -> str:
    prefix = next(prefix for prefix in _KOHYA_PREFIXES if native.startswith(prefix))
    return _KOHYA_PREFIXES[prefix] + native[len(prefix) :].replace(".", "_")


_PARTS = _native_layers()
_NATIVE = {part: native for native, parts in _PARTS.items() for part in parts}
_KOHYA = {_kohya_name(native): native for native in _PARTS}


class _Lora(NamedTuple):
    a: np.ndarray  # [rank, inputs]
    b: np.ndarray  # [outputs, rank]
    scale: float  # alpha / rank


def layout_of(names: Iterable[str]) -> Optional[str]:
    """The layout of a file with these entries, or None if it is no LoRA."""
    modules = [name[: -len(end)] for name in names for end, role in _ROLES.items() if role != "alpha" and name.endswith(end)]
    if not modules:
        return None
    if any(module.startswith(("lora_unet_", "lora_te")) for module in modules):
        return "kohya"
    return "comfyui" if any(module.startswith(("diffusion_model.", "text_encoders.")) for module in modules) else "diffusers"


def ranks(tensors: dict[str, np.ndarray]) -> dict[str, int]:
    """The rank of every layer that the tensors adapt, in whatever layout."""
    ends = [end for end, role in _ROLES.items() if role == "a"]
    return {name[: -len(end)]: a.shape[0] for name, a in tensors.items() for end in ends if name.endswith(end)}


def to_diffusers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in diffusers' layout, from any of the three. `.alpha` is left out where it is the rank.

    Of a native weight that holds several layers, a layer gets its block, if B consists of equal blocks on the diagonal, without the
    columns that only fill it up: those that are zero in A and B. Any other B gives a layer all columns in which its own rows are not
    all zero, with their rows of A. A layer that is left with no column was not adapted. (An adapter that was never trained has a B of
    zeros, so it counts as blocks; where its rank does not divide, each layer gets all of A.)

    Raises ValueError for a layer that FLUX does not have, for entries that are no part of a LoRA, and for shapes that cannot be.
    """
    found, layout = _modules(tensors), layout_of(tensors)
    if layout == "diffusers":
        return tensors
    loras = {}
    for module, lora in found.items():
        template, number = _template(module)
        native = _KOHYA.get(template) if layout == "kohya" else template
        if native not in _PARTS:
            raise ValueError(f"FLUX.1 has no layer {module}")
        names = [part.replace("#", number) for part in _PARTS[native]]
        parts = _split(module, lora, len(names)) if len(names) > 1 else [_swap(lora) if native == _SWAPPED else lora]
        loras.update({name: part for name, part in zip(names, parts) if part is not None})
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
    for module, lora in _modules(tensors).items():
        template, number = _template(module)
        if template not in _NATIVE:
            raise ValueError(f"{layout}'s layout has no name for the layer {module}")
        groups.setdefault(_NATIVE[template].replace("#", number), {})[template] = lora
    loras = {}
    for native, found in groups.items():
        template = _template(native)[0]
        parts = [found.get(part) for part in _PARTS[template]]
        lora = _fuse(native, parts) if len(parts) > 1 else parts[0]
        loras[native] = _swap(lora) if template == _SWAPPED else lora
    if layout == "kohya":
        return _tensors({_kohya_name(native): lora for native, lora in loras.items()}, "lora_down", "lora_up", every_alpha=True)
    return _tensors(loras, "lora_A", "lora_B", every_alpha=True)


def _modules(tensors: dict[str, np.ndarray]) -> dict[str, _Lora]:
    """Layers by name, in whatever layout."""
    entries: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        end = next((end for end in _ROLES if name.endswith(end)), None)
        if end is None:
            raise ValueError(f"{name} is neither A nor B nor alpha of a LoRA; other kinds of adapters are not supported")
        entries.setdefault(name[: -len(end)], {})[_ROLES[end]] = value
    found = {}
    for module, entry in entries.items():
        shapes = [entry[role].shape if role in entry else "nothing" for role in "ab"]
        if "nothing" in shapes or [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise ValueError(f"A and B of {module} are {shapes[0]} and {shapes[1]}, which is no LoRA of a linear layer")
        rank = shapes[0][0]
        found[module] = _Lora(entry["a"], entry["b"], float(entry["alpha"].item()) / rank if "alpha" in entry else 1.0)
    return found


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
            raise ValueError(f"A and B of a layer in {native} are {part.a.shape} and {part.b.shape}, expected {inputs} -> {outputs}")
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
        raise ValueError(f"B of {module} has {lora.b.shape[0]} rows, expected {sum(rows)} for {inputs} inputs")
    pieces = np.split(lora.b, np.cumsum(rows)[:-1])
    used = np.array([np.any(piece != 0, axis=0) for piece in pieces])
    blocks = np.arange(rank) * count // rank == np.arange(count)[:, None]
    if rank % count == 0 and not np.any(used & ~blocks):
        used = blocks & (used | np.any(lora.a != 0, axis=1))
    elif not np.any(used):
        used[:] = True
    return [_Lora(lora.a[mask], piece[:, mask], lora.scale) if mask.any() else None for piece, mask in zip(pieces, used)]


def _swap(lora: _Lora) -> _Lora:
    """The two halves of the outputs, exchanged."""
    half = lora.b.shape[0] // 2
    return lora._replace(b=np.concatenate([lora.b[half:], lora.b[:half]]))
