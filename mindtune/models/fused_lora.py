"""The LoRA of a weight that contains several layers, such as q, k and v: joining those of the layers, and splitting it.

Black Forest Labs' own model has such weights; see `lora_layouts`. Pure NumPy; raises ValueError.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

ADVICE = "Give a LoRA of FLUX.1"


class Lora(NamedTuple):
    """The LoRA of one weight, which changes by scale * b @ a; its layer's bias changes by scale * `bias`."""

    a: np.ndarray  # [rank, inputs]
    b: np.ndarray  # [outputs, rank]
    scale: float  # alpha / rank
    magnitude: Optional[np.ndarray] = None  # [outputs], of a DoRA
    bias: Optional[np.ndarray] = None  # [outputs], of B


def _output_widths(count: int, inputs: int) -> list[int]:
    """The number of outputs of the layers in a native weight: `inputs` for q, k and v, four times that for the MLP."""
    return [inputs, inputs, inputs, 4 * inputs][:count]


def fuse(native: str, parts: list[Optional[Lora]]) -> Lora:
    """Joins the LoRAs of the layers in one native weight; see `lora_layouts.from_diffusers`."""
    found = [part for part in parts if part is not None]
    inputs = found[0].a.shape[1]
    rows = _output_widths(len(parts), inputs)
    for part, outputs in zip(parts, rows):
        if part is not None and (part.a.shape[1], part.b.shape[0]) != (inputs, outputs):
            raise ValueError(
                f"A and B of a layer in {native} are {part.a.shape} and {part.b.shape}, expected {inputs} inputs and "
                f"{outputs} outputs. {ADVICE}"
            )
    scale = found[0].scale
    if any(part.scale != scale for part in found):
        parts = [part and part._replace(b=(part.b * np.float32(part.scale)).astype(part.b.dtype)) for part in parts]
        scale = 1.0
    if all(part is not None and np.array_equal(part.a, found[0].a) for part in parts):
        return Lora(found[0].a, np.concatenate([part.b for part in parts]), scale)
    block = max(part.a.shape[0] for part in found)
    a = np.zeros((block * len(parts), inputs), found[0].a.dtype)
    b = np.zeros((sum(rows), block * len(parts)), found[0].b.dtype)
    for number, part in enumerate(parts):
        if part is not None:
            columns = slice(block * number, block * number + part.a.shape[0])
            a[columns] = part.a
            b[sum(rows[:number]) : sum(rows[: number + 1]), columns] = part.b
    return Lora(a, b, scale)


def split(module: str, lora: Lora, count: int) -> list[Optional[Lora]]:
    """Splits the LoRA of a native weight, None for a layer that is not adapted; see `lora_layouts.to_diffusers`.

    With a bias, every layer gets all columns.
    """
    rank, inputs = lora.a.shape
    rows = _output_widths(count, inputs)
    if lora.b.shape[0] != sum(rows):
        raise ValueError(
            f"B of {module} has {lora.b.shape[0]} rows, expected {sum(rows)} for {inputs} inputs. {ADVICE}"
        )
    pieces = np.split(lora.b, np.cumsum(rows)[:-1])
    if lora.bias is not None:
        biases = np.split(lora.bias, np.cumsum(rows)[:-1])
        return [Lora(lora.a, piece, lora.scale, bias=bias) for piece, bias in zip(pieces, biases)]
    used = np.array([np.any(piece != 0, axis=0) for piece in pieces])
    blocks = np.arange(rank) * count // rank == np.arange(count)[:, None]
    if rank % count == 0 and not np.any(used & ~blocks):
        used = blocks & (used | np.any(lora.a != 0, axis=1))
    elif not np.any(used):
        used[:] = True
    return [Lora(lora.a[mask], piece[:, mask], lora.scale) if mask.any() else None for piece, mask in zip(pieces, used)]


def swap_halves(lora: Lora) -> Lora:
    """Swaps the two halves of the outputs."""
    half = lora.b.shape[0] // 2
    bias = None if lora.bias is None else np.roll(lora.bias, half)
    return lora._replace(b=np.roll(lora.b, half, axis=0), bias=bias)
