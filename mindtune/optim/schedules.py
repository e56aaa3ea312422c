"""Learning-rate schedules: functions of the number of the update. Scripts set the rate before every update."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial")  # schedules that depend on their length


class Schedule(NamedTuple):
    """A schedule of `length` updates, warm-up included, over the learning rate `base`.

    Names and curves are those of the schedules in transformers.
    """

    base: float
    length: int
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: float = 1  # of cosine_with_restarts
    lr_power: float = 1.0  # of polynomial, which ends at a rate of 1e-7

    def rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        return self.base * self.factor(update)

    def factor(self, update: int) -> float:
        """The learning rate of an update divided by the base rate. Raises ValueError for an unknown schedule."""
        name = self.lr_scheduler
        if name == "constant":
            return 1.0
        if update < self.lr_warmup_steps:
            return update / max(1, self.lr_warmup_steps)
        if name == "constant_with_warmup":
            return 1.0
        done = (update - self.lr_warmup_steps) / max(1, self.length - self.lr_warmup_steps)
        if name == "linear":
            return max(0.0, 1.0 - done)
        if name == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
        if name == "cosine_with_restarts":
            return 0.0 if done >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((self.lr_num_cycles * done) % 1.0)))
        if name == "polynomial":
            end = min(1e-7 / self.base, 1.0) if self.base else 0.0
            return end if done >= 1.0 else (1.0 - end) * (1.0 - done) ** self.lr_power + end
        raise ValueError(f"unknown schedule {name}")


class Settings(NamedTuple):
    """Learning rate and schedule. The fields have the names of the flags."""

    learning_rate: float
    scale_lr: bool = False
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    lr_schedule_steps: Optional[int] = None
    lr_num_cycles: float = 1
    lr_power: float = 1.0


def create(settings: Settings, samples_per_update: int, max_train_steps: int) -> Schedule:
    """The schedule of a run of `max_train_steps` updates."""
    return Schedule(
        base=settings.learning_rate * (samples_per_update if settings.scale_lr else 1),
        length=settings.lr_schedule_steps or max_train_steps,
        lr_scheduler=settings.lr_scheduler,
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_num_cycles=settings.lr_num_cycles,
        lr_power=settings.lr_power,
    )
