"""Learning-rate schedules: the rate is set from the host before every update, a function of the update's number."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def schedule_factor(
    name: str, update: int, warmup: int, total: int, cycles: float = 1, power: float = 1.0, lr: float = 1.0
) -> float:
    """What update number `update` (from 0) multiplies the base rate with.

    Names and shapes are those of transformers' schedules: `cycles` is for cosine_with_restarts alone, `power` for polynomial, which
    ends at a rate of 1e-7 whatever the base `lr`.
    """
    if name == "constant":
        return 1.0
    if update < warmup:
        return update / max(1, warmup)
    if name == "constant_with_warmup":
        return 1.0
    done = (update - warmup) / max(1, total - warmup)
    if name == "linear":
        return max(0.0, 1.0 - done)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    if name == "cosine_with_restarts":
        return 0.0 if done >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((cycles * done) % 1.0)))
    if name == "polynomial":
        end = min(1e-7 / lr, 1.0) if lr else 0.0
        return end if done >= 1.0 else (1.0 - end) * (1.0 - done) ** power + end
    raise ValueError(f"unknown schedule {name}")
