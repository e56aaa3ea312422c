"""Mathematics on LoRA adapters without a model: adding them, reducing their ranks, and extracting them from a matrix.

Every layer's weight changes by B A. Products of this size are never computed: with B = Q_b R_b and A^T = Q_a R_a, the
singular values of B A are those of the small matrix R_b R_a^T. All matrices are float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np

from mindtune import rng
from mindtune.cli import UserError
from mindtune.models import lora_files, lora_layouts
from mindtune.models.precision import NUMPY_DTYPES
from mindtune.models.safetensors_file import read_safetensors

# Block Krylov iterations of `truncated_svd`. With 8 it kept 0.9999 of the energy of an exact decomposition where the
# singular values decay, and 0.99 of it for noise, where all of them are alike (12288 x 3072, ranks 16 and 64).
_PASSES = 8
_OVERSAMPLING = 8


class Pair(NamedTuple):
    """The LoRA of one layer: its weight changes by b @ a."""

    a: np.ndarray  # [rank, inputs]
    b: np.ndarray  # [outputs, rank], with alpha / rank multiplied in


class Svd(NamedTuple):
    """The largest singular values of a matrix with their vectors: it is near u * s @ vt."""

    u: np.ndarray  # [outputs, k]
    s: np.ndarray  # [k], descending
    vt: np.ndarray  # [k, inputs]


class Reduced(NamedTuple):
    """A layer at a lower rank. `kept` and `energy`: the sums of its squared singular values after and before."""

    pair: Pair
    kept: float
    energy: float


# ---- files ---------------------------------------------------------------------------------------


def to_pairs(path: Path, flag: str, adapters: dict[str, dict[str, np.ndarray]]) -> dict[str, Pair]:
    """The layers of `lora_files.read_adapters` by their names with the prefix of their model.

    Raises UserError for a DoRA or LoKr, and for tensors that are neither A nor B: they would be lost.
    """
    pairs = {}
    for prefix, adapter in adapters.items():
        if (kind := lora_layouts.kind(adapter)) != "lora":
            raise UserError(
                f"{flag} {path}: is a {lora_layouts.KINDS[kind][0]}, and only LoRA can be edited. Give a LoRA."
            )
        for name in adapter:
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise UserError(f"{flag} {path}: holds {prefix}.{name}. Only plain LoRA (A and B) can be edited.")
        for layer in lora_layouts.ranks(adapter):
            pairs[f"{prefix}.{layer}"] = Pair(adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"])
    return pairs


def write(path: Path, pairs: dict[str, Pair], layout: str, dtype: ms.Type) -> str:
    """Writes a LoRA file with alpha = rank, and returns a summary of it.

    Raises ValueError for a layer that the layout has no name for, and for values beyond the range of the dtype.
    """
    tensors, alphas = {}, {}
    for layer, pair in pairs.items():
        for half, value in (("A", pair.a), ("B", pair.b)):
            with np.errstate(over="ignore"):
                stored = value.astype(NUMPY_DTYPES[dtype])
            if not np.isfinite(stored).all():
                raise ValueError(f"{half} of {layer} has values beyond the range of {str(dtype).lower()}")
            tensors[f"{layer}.lora_{half}.weight"] = stored
        alphas[layer] = float(len(pair.a))
    return lora_files.write_lora(path, tensors, alphas, layout, dtype)


def common_dtype(dtypes: Iterable[np.dtype]) -> ms.Type:
    """The dtype that all weights have, float16 for 8-bit weights; float32 if they have several or another one."""
    found = {np.dtype(np.float16) if np.dtype(dtype).itemsize == 1 else np.dtype(dtype) for dtype in dtypes}
    return next((key for key, value in NUMPY_DTYPES.items() if found == {np.dtype(value)}), ms.float32)


def dtype_of(paths: Iterable[Path]) -> ms.Type:
    """`common_dtype` of all weights in LoRA files that `lora_files.read_adapters` has read."""
    tensors = [item for path in paths for item in read_safetensors(path)[0].items()]
    return common_dtype(value.dtype for name, value in tensors if not name.endswith("alpha"))


# ---- sums ----------------------------------------------------------------------------------------


def weighted_sum(loras: list[dict[str, Pair]], weights: list[float]) -> dict[str, Pair]:
    """The exact weighted sum of several LoRAs: every layer's A below each other, its B side by side.

    The ranks add up. A layer that only some LoRAs adapt has the ranks of these. Raises ValueError if a layer has other
    widths in another LoRA.
    """
    parts: dict[str, list[Pair]] = {}
    for lora, weight in zip(loras, weights):
        for layer, pair in lora.items():
            others = parts.setdefault(layer, [])
            widths = (pair.a.shape[1], pair.b.shape[0])
            if others and (found := (others[0].a.shape[1], others[0].b.shape[0])) != widths:
                raise ValueError(
                    f"made for different models: {layer} has {found[0]} inputs and {found[1]} outputs in one LoRA, "
                    f"{widths[0]} and {widths[1]} in another"
                )
            others.append(pair._replace(b=pair.b * np.float32(weight)))
    return {
        layer: Pair(np.concatenate([pair.a for pair in found]), np.concatenate([pair.b for pair in found], axis=1))
        for layer, found in parts.items()
    }


# ---- singular values -----------------------------------------------------------------------------


def svd(pair: Pair) -> Svd:
    """The singular value decomposition of b @ a, by that of the core R_b R_a^T."""
    qb, core, qa = _factors(pair)
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    return Svd(qb @ u, s, vt @ qa.T)


def norm(pair: Pair) -> float:
    """The Frobenius norm of b @ a."""
    return float(np.linalg.norm(_factors(pair)[1]))


def _factors(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Q_b, core, Q_a) with b @ a = Q_b core Q_a^T and orthonormal columns in both Q."""
    qb, rb = np.linalg.qr(pair.b)
    qa, ra = np.linalg.qr(pair.a.T)
    return qb, rb @ ra.T, qa


def reduce_rank(pair: Pair, rank: Optional[int] = None, energy: Optional[float] = None) -> Reduced:
    """The best approximation of b @ a with at most `rank`, or with the lowest rank that keeps the share `energy`.

    Of all matrices with this rank it has the smallest error in the Frobenius norm (Eckart and Young 1936): the error is
    that of the discarded singular values. A layer that already has this rank is returned unchanged.
    """
    found = svd(pair)
    squares = found.s.astype(np.float64) ** 2
    total = float(squares.sum())
    if energy is not None:
        rank = int(np.searchsorted(np.cumsum(squares), energy * total)) + 1 if total else 1
    if rank >= len(pair.a):
        return Reduced(pair, total, total)
    return Reduced(_balanced(found, rank), float(squares[:rank].sum()), total)


def from_matrix(matrix: np.ndarray, rank: int) -> Reduced:
    """A LoRA of at most `rank` for a weight change [outputs, inputs]."""
    found = truncated_svd(matrix, rank)
    kept = np.sum(found.s[:rank].astype(np.float64) ** 2)
    energy = np.einsum("oi,oi->o", matrix, matrix).sum(dtype=np.float64)
    return Reduced(_balanced(found, rank), float(kept), float(energy))


def _balanced(found: Svd, rank: int) -> Pair:
    """A and B from the first `rank` singular values, each with their square roots."""
    root = np.sqrt(found.s[:rank])
    return Pair(root[:, None] * found.vt[:rank], found.u[:, :rank] * root)


def truncated_svd(matrix: np.ndarray, rank: int) -> Svd:
    """At least the `rank` largest singular values of a matrix, or all that it has.

    Small matrices exactly. Of a large one by block Krylov iteration from random columns, which takes seconds where a
    full decomposition takes minutes (Musco and Musco 2015, arXiv 1504.05477, algorithm 2). The same matrix gives the
    same result every time.
    """
    columns = rank + _OVERSAMPLING
    if columns * _PASSES >= min(matrix.shape) // 2:
        return Svd(*np.linalg.svd(matrix, full_matrices=False))
    block, blocks = matrix @ rng.normal(0, "truncated_svd", shape=(matrix.shape[1], columns)), []
    for _ in range(_PASSES):
        block = np.linalg.qr(block)[0]
        blocks.append(block)
        block = matrix @ (matrix.T @ block)
    basis = np.linalg.qr(np.concatenate(blocks, axis=1))[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Svd(basis @ u, s, vt)
