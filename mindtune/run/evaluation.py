"""Loss on pictures kept out of training, by timestep, with the same draws every time: what shows whether a model learns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune import flow
from mindtune.models.execution import eval_mode

HELD_OUT_INDICES = [62, 187, 312, 437, 562, 687, 812, 937]  # the middles of eighths of 1000


def held_out_loss(
    step: nn.Cell, trained: Iterable[nn.Cell], batch: Callable[[int, int], tuple], count: int
) -> list[float]:
    """Plain flow-matching loss at each of HELD_OUT_INDICES, averaged over `count` pictures.

    `batch(sample_id, index)` gives the arrays of one picture for `step.predict`, which gives prediction, target and sigmas.
    """
    losses = []
    with eval_mode(*trained):
        for index in HELD_OUT_INDICES:
            values = []
            for sample_id in range(count):
                prediction, target, sigmas = step.predict(*map(ms.Tensor, batch(sample_id, index)))
                values.append(float(flow.weighted_mse(prediction, target, ops.ones_like(sigmas))))
            losses.append(float(np.mean(values)))
    return losses
