"""Loss on pictures kept out of training, by timestep, with the same draws every time: what shows whether a model learns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune import flow
from mindtune.cli import UserError
from mindtune.rng import generator
from mindtune.sampling import resting

HELD_OUT_INDICES = [62, 187, 312, 437, 562, 687, 812, 937]  # the middles of eighths of 1000


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held out): a seeded choice of `share` of the ids below `count`, at least one if the share is above 0.

    Raises UserError if none would be left to train on.
    """
    if not share:
        return list(range(count)), []
    wanted = max(1, round(share * count))
    if wanted >= count:
        raise UserError(f"--validation_split {share}: would keep out {wanted} of {count} pictures; use a smaller share.")
    out = set(generator(seed, "held out").permutation(count)[:wanted].tolist())
    return [i for i in range(count) if i not in out], sorted(out)


def held_out_loss(step: nn.Cell, trained: Iterable[nn.Cell], batch: Callable[[int, int], tuple], count: int) -> list[float]:
    """Plain flow-matching loss at each of HELD_OUT_INDICES, averaged over `count` pictures.

    `batch(sample_id, index)` gives the arrays of one picture for `step.predict`, which gives prediction, target and sigmas.
    """
    losses = []
    with resting(*trained):
        for index in HELD_OUT_INDICES:
            values = []
            for sample_id in range(count):
                prediction, target, sigmas = step.predict(*map(ms.Tensor, batch(sample_id, index)))
                values.append(float(flow.weighted_mse(prediction, target, ops.ones_like(sigmas))))
            losses.append(float(np.mean(values)))
    return losses
