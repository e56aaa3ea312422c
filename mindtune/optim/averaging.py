"""Exponential moving average of the trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mindspore as ms
from mindspore import nn, ops


class EMA(nn.Cell):
    """Exponential moving average of parameters, float32, on the device.

    The decay at update t is min(decay, (1 + t) / (10 + t)), as in diffusers and timm: smaller in the first updates.
    """

    def __init__(self, parameters: list[ms.Parameter], decay: float):
        super().__init__(auto_prefix=False)
        self.decay = decay
        self.live = ms.ParameterTuple(parameters)
        self.averages = ms.ParameterTuple(
            [ms.Parameter(p.to(ms.float32).copy(), name=f"ema.{p.name}", requires_grad=False) for p in parameters]
        )
        self.hyper_map = ops.HyperMap()

    def update(self, step: int, every: int = 1) -> None:
        """Updates the averages after update `step` (from 1). `every`: the number of updates since the last call."""
        decay = min(self.decay, (1 + step) / (10 + step)) ** every
        self(ms.Tensor(1.0 - decay, ms.float32))

    def construct(self, weight):
        return self.hyper_map(ops.partial(_move, weight), self.averages, self.live)

    def by_name(self) -> dict[str, ms.Parameter]:
        """The averages by the names of the parameters, for a checkpoint."""
        return {p.name: average for p, average in zip(self.live, self.averages)}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """In this context the parameters have the values of their averages."""
        live_values = [p.asnumpy().copy() for p in self.live]
        for parameter, average in zip(self.live, self.averages):
            parameter.set_data(ms.Tensor(average.asnumpy(), parameter.dtype))
        try:
            yield
        finally:
            for parameter, value in zip(self.live, live_values):
                parameter.set_data(ms.Tensor(value, parameter.dtype))


def _move(weight, average, live):
    return ops.assign(average, average + weight * (live.to(ms.float32) - average))
