"""Sentences about settings with which a run will surely disappoint. A run goes on all the same: they are its user's to choose."""

from __future__ import annotations

from typing import Optional

from mindtune.optim.schedules import schedule_factor

DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial")  # schedules whose course depends on their length


def on_settings(
    optimizer: str, learning_rate: float, schedule: str, warmup_steps: int, schedule_steps: int, max_train_steps: int
) -> list[str]:
    """A sentence for every setting that will disappoint."""
    said = []
    if optimizer == "prodigy" and learning_rate <= 0.1:
        said.append(f"--learning_rate {learning_rate:g} with --optimizer prodigy: prodigy finds the step size itself, and this is a factor "
                    "to it; with 0.1 or less it learns next to nothing. 1.0 is usual.")  # fmt: skip
    if optimizer != "prodigy" and learning_rate >= 0.1:
        said.append(f"--learning_rate {learning_rate:g} with --optimizer {optimizer}: rates of 0.1 and more are prodigy's; "
                    "the loss will grow. 1e-4 to 1e-6 is usual.")  # fmt: skip
    if schedule != "constant" and warmup_steps >= max_train_steps:
        said.append(f"--lr_warmup_steps {warmup_steps}: the run has {max_train_steps} updates, so the rate never reaches --learning_rate. "
                    "Give a shorter warm-up.")  # fmt: skip
    if schedule in DECAYING and schedule_steps < max_train_steps:
        said.append(f"--lr_schedule_steps {schedule_steps}: the schedule ends {max_train_steps - schedule_steps} updates before the run; "
                    "from there on the rate is at its end, 0 or close to it.")  # fmt: skip
    return said


def on_resumed_schedule(
    schedule: str,
    before: Optional[int],
    steps: int,
    step: int,
    learning_rate: float,
    warmup_steps: int,
    cycles: float,
    power: float,
) -> list[str]:
    """What resuming after update `step` does to the rate if the schedule was `before` updates long (None: not known) and now is `steps`."""
    if schedule not in DECAYING or before in (None, steps):
        return []
    rates = [
        learning_rate * schedule_factor(schedule, step, warmup_steps, total, cycles, power, learning_rate)
        for total in (before, steps)
    ]
    return [
        f"--max_train_steps: the checkpoint's {schedule} schedule is {before} updates long, this run's {steps}; the rate of update "
        f"{step + 1} would have been {rates[0]:.2e} and is {rates[1]:.2e}. --lr_schedule_steps {before} keeps the old schedule."
    ]
