"""Runs a case forward and backward, and compares the output and the gradients with NumPy's in float64."""

from __future__ import annotations

import inspect
import time
import zlib
from typing import Any, Callable, NamedTuple, Optional

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import nn, ops

from mindtune.cli import printable
from mindtune.doctor.cases import Case

DTYPES = {
    "float32": (ms.float32, np.float32),
    "float16": (ms.float16, np.float16),
    "bfloat16": (ms.bfloat16, ml_dtypes.bfloat16),
}
EPSILONS = {ms.float32: 2.0**-23, ms.float16: 2.0**-10, ms.bfloat16: 2.0**-7}


class Row(NamedTuple):
    """The result of a case in one dtype.

    `error` is the largest error of the output and of all gradients, each relative to the largest entry of its exact
    values; `where` names the one with the largest share of its `bound`. `milliseconds` are those of a second call,
    forward and backward. `problem` says what is wrong: None if the error is within the bound.
    """

    name: str
    dtype: str
    error: Optional[float] = None
    bound: Optional[float] = None
    where: str = ""
    milliseconds: Optional[float] = None
    problem: Optional[str] = None


class Forward(nn.Cell):
    """A function as a cell, which graph mode compiles."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def construct(self, *inputs):
        return self.function(*inputs)


class Backward(nn.Cell):
    """The gradients of a cell by all inputs. The last input is the gradient by the cell's output."""

    def __init__(self, forward: nn.Cell):
        super().__init__()
        self.forward, self.gradient = forward, ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs):
        return self.gradient(self.forward)(*inputs)


def error_bound(case: Case, dtype: ms.Type) -> float:
    """The error that a case may have in a result of this dtype, relative to its largest entry.

    Each rounding adds at most half an epsilon. Sums are computed in float32, also those of half precision, and their
    error grows with the square root of the number of terms (Higham and Mary, "A New Approach to Probabilistic Rounding
    Error Analysis", 2019).
    """
    return case.roundings * EPSILONS[dtype] / 2 + case.terms**0.5 * EPSILONS[ms.float32]


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference, relative to the largest exact value. NaN if anything found is not a number."""
    return float(np.abs(found.astype(np.float64) - exact).max() / max(np.abs(exact).max(), 1e-30))


def check(case: Case, dtype: str) -> Row:
    """The row of a case. What the operator raises becomes the row's problem."""
    try:
        return _check(case, dtype)
    except Exception as error:  # whatever the device or the compiler raises; the other cases still run
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return Row(case.name, dtype, problem=f"{type(error).__name__}: {printable(lines[0])}")


def _check(case: Case, dtype: str) -> Row:
    tensors = [_tensor(array, dtype) for array in case.inputs]
    exact_inputs = [_numpy(tensor).astype(np.float64) for tensor in tensors]
    forward = Forward(case.function) if case.compiled else case.function
    out = forward(*tensors)
    g = np.random.default_rng(zlib.crc32(case.name.encode())).standard_normal(out.shape)
    sens = ms.Tensor(g, ms.float32).astype(out.dtype)
    try:
        exact, exact_gradients = case.reference(_numpy(sens).astype(np.float64), *exact_inputs)
    except ValueError as error:
        raise ValueError(f"the output has the shape {out.shape}, with which NumPy stops: {error}") from error
    results = [("output", out, exact)]
    backward = Backward(forward) if any(item is not None for item in exact_gradients) else None
    if backward:
        names = [f"gradient of {name}" for name in list(inspect.signature(case.reference).parameters)[1:]]
        results += zip(names, backward(*tensors, sens), exact_gradients)
    found = [_compared(case, *result) for result in results if result[2] is not None]

    start = time.perf_counter()
    last = backward(*tensors, sens)[0] if backward else None
    _numpy(forward(*tensors))
    if last is not None:
        _numpy(last)
    milliseconds = 1000 * (time.perf_counter() - start)
    worst = max(found, key=lambda row: np.nan_to_num(row[1] / row[2], nan=np.inf))
    where, error, bound = worst
    problem = None
    if not error <= bound:
        problem = f"the {where} has an error of {error:.1e}, the bound is {bound:.1e}"
    return Row(case.name, dtype, error, bound, where, milliseconds, problem)


def _compared(case: Case, where: str, found: ms.Tensor, exact: Any) -> tuple[str, float, float]:
    """(where, error, bound) of a result. Raises ValueError if it has another shape than it should."""
    if found.shape != exact.shape:
        raise ValueError(f"the {where} has the shape {found.shape} instead of {exact.shape}")
    return where, relative_error(_numpy(found), exact), error_bound(case, found.dtype)


def _tensor(array: np.ndarray, dtype: str) -> ms.Tensor:
    return ms.Tensor(array, ms.float32).astype(DTYPES[dtype][0]) if array.dtype == np.float64 else ms.Tensor(array)


def _numpy(tensor: ms.Tensor) -> np.ndarray:
    return (tensor.astype(ms.float32) if tensor.dtype == ms.bfloat16 else tensor).asnumpy()
