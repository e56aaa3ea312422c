"""Who is stored and computed in which type, and what trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import mint, nn, ops
from mindspore.amp import DynamicLossScaler, StaticLossScaler

from mindtune.models.fast_ops import square_sum

DTYPES = {"no": ms.float32, "fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}
NUMPY_TYPES = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}
# mindone 0.5 builds its models of mint's layers, which are no subclasses of nn's. Their weights have one layout: [out, in, ...].
LINEAR, CONVOLUTION = (nn.Dense, mint.nn.Linear), (nn.Conv2d, mint.nn.Conv2d)
MINT_NORM = (
    mint.nn.GroupNorm,
    mint.nn.LayerNorm,
)  # refuse a half-precision input beside a float32 weight; mindone 0.3's cast the weight


class Precision(NamedTuple):
    """`storage`: type of frozen parameters; `compute`: type of activations. They differ for bf16 on the CPU only."""

    storage: ms.Type
    compute: ms.Type


def resolve_precision(name: str) -> Precision:
    """no, fp32, fp16 or bf16 on the current device. The CPU has no bf16 matrix product: stored in bf16, computed in fp32."""
    storage = DTYPES[name]
    on_cpu = ms.get_context("device_target") == "CPU"
    return Precision(storage, ms.float32 if on_cpu and storage == ms.bfloat16 else storage)


def loss_scaler(name: str):
    """Dynamic scale for fp16 gradients (2^16 at first, halved on overflow, doubled after 2000 good updates); 1 otherwise."""
    return DynamicLossScaler(2.0**16, 2, 2000) if name == "fp16" else StaticLossScaler(1.0)


def freeze_params(*cells: Optional[nn.Cell]) -> None:
    """Makes every parameter of `cells` frozen. None is passed over."""
    for cell in cells:
        for parameter in cell.get_parameters() if cell is not None else ():
            parameter.requires_grad = False


def cast_cell(cell: nn.Cell, precision: Precision) -> nn.Cell:
    """Floating parameters to the storage type; they compute in it too, or by `to_float` in the wider compute type. Returns `cell`.

    `to_float` is for widening only: in PyNative it also narrows what a model computes in fp32 on purpose (the sinusoids of FLUX's
    timestep and guidance lost 24% that way in fp16).
    """
    # Layers that overflow in fp16 by their authors' word, such as T5's `wo`.
    wide = set(getattr(cell, "_keep_in_fp32_modules", None) or ()) if precision.storage == ms.float16 else set()
    for name, parameter in cell.parameters_and_names():
        storage = ms.float32 if wide & set(name.split(".")) else precision.storage
        if parameter.is_floating_point() and parameter.dtype != storage:
            parameter.set_dtype(storage)
    if precision.storage != precision.compute:
        cell.to_float(precision.compute)
    return cell


def compute_in(cell: nn.Cell, dtype: ms.Type) -> nn.Cell:
    """Linear and convolution layers of a float32 `cell`, and mint's norms, take and give `dtype`; returns `cell`.

    Only these leaves: `to_float` on the whole would narrow what is computed in fp32 on purpose (see `cast_cell`).
    """
    if dtype != ms.float32:
        for _, leaf in cell.cells_and_names():
            if isinstance(leaf, LINEAR + CONVOLUTION + MINT_NORM):
                leaf.to_float(dtype)
    return cell


def cast_training_params(models: Iterable[nn.Cell], dtype: ms.Type = ms.float32) -> None:
    """What trains goes to `dtype`: MindSpore's optimizers update in the parameter's own precision and never upcast."""
    for model in models:
        for parameter in model.trainable_params():
            parameter.set_dtype(dtype)


def parameter_table(models: dict[str, nn.Cell], precision: Precision) -> str:
    """One line a module and stored type: name, stored, computed, parameters, of them trainable."""
    rows = [("module", "stored", "computed", "parameters", "trainable")]
    for name, model in models.items():
        for trains in (False, True) if model is not None else ():
            group = [p for p in model.get_parameters() if p.requires_grad == trains]
            if group:
                count = sum(p.size for p in group)
                stored = "+".join(sorted({str(p.dtype).lower() for p in group}))
                label = f"{name} (trained)" if trains else name
                rows.append(
                    (label, stored, str(precision.compute).lower(), f"{count:,}", f"{count:,}" if trains else "0")
                )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
    )


@ms.jit_class
class GradNormClipper:
    """Clips gradients to a global 2-norm, torch's formula min(1, max / (norm + 1e-6)), and keeps the norm for the log.

    Stands in for mindone's `GradClipper` inside a `TrainStep`. `max_norm` 0 only measures.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.norm = ms.Parameter(ms.Tensor(0.0, ms.float32), name="grad_norm", requires_grad=False)
        self.hyper_map = ops.HyperMap()

    def clip_grad_norm(self, grads):
        squares = self.hyper_map(square_sum, grads)
        norm = ops.sqrt(ops.addn(squares))
        ops.assign(self.norm, norm)
        if self.max_norm > 0:
            factor = ops.minimum(self.max_norm / (norm + 1e-6), ms.Tensor(1.0, ms.float32))
            grads = self.hyper_map(ops.partial(_scale, factor), grads)
        return grads


def _scale(factor, grad):
    return grad * factor.to(grad.dtype)
