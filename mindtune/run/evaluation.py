"""Held-out loss: the loss on images that are not trained on, by timestep, with the same noise in every evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune import flow
from mindtune.cli import progress_bar
from mindtune.models.execution import eval_mode

HELD_OUT_INDICES = [62, 187, 312, 437, 562, 687, 812, 937]  # the centres of eight equal parts of 1000 timesteps


def held_out_loss(
    step: nn.Cell, trained: Iterable[nn.Cell], batch: Callable[[int, int], tuple], count: int
) -> list[float]:
    """The unweighted loss at each of HELD_OUT_INDICES, averaged over `count` held-out images.

    `batch(sample_id, index)` returns the arrays of one image at one timestep for `step.predict`, which returns
    prediction, target and sigmas. The `trained` cells are in evaluation mode meanwhile.
    """
    losses = []
    with eval_mode(*trained), progress_bar("held-out loss", "sample", len(HELD_OUT_INDICES) * count) as bar:
        for index in HELD_OUT_INDICES:
            values = []
            for sample_id in range(count):
                prediction, target, sigmas = step.predict(*map(ms.Tensor, batch(sample_id, index)))
                values.append(float(flow.sample_losses(prediction, target, ops.ones_like(sigmas)).mean()))
                bar.update()
            losses.append(float(np.mean(values)))
    return losses
