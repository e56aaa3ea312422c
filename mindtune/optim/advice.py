"""Warnings about learning rates and schedules that will not train well. The run continues."""

from __future__ import annotations

from typing import Optional

from mindtune.optim.schedules import DECAYING, Schedule


def on_schedule(optimizer: str, schedule: Schedule, max_train_steps: int, resumed: dict) -> list[str]:
    """The warnings for a run. `resumed` is the trainer_state.json of its checkpoint, or empty for a new run."""
    messages = on_settings(optimizer, schedule, max_train_steps)
    return messages + on_resume(schedule, resumed.get("lr_schedule_steps"), resumed.get("global_step", 0))


def on_settings(optimizer: str, schedule: Schedule, max_train_steps: int) -> list[str]:
    """A warning per setting that will not train well."""
    messages = []
    rate, warmup = schedule.base, schedule.lr_warmup_steps
    if optimizer == "prodigy" and rate <= 0.1:
        messages.append(
            f"--learning_rate {rate:g} with --optimizer prodigy: prodigy multiplies its own step size by this; with "
            "0.1 or less it hardly trains. 1.0 is usual."
        )
    if optimizer != "prodigy" and rate >= 0.1:
        messages.append(
            f"--learning_rate {rate:g} with --optimizer {optimizer}: rates of 0.1 and above are for prodigy; "
            "the loss will grow. 1e-4 to 1e-6 is usual."
        )
    if schedule.lr_scheduler != "constant" and warmup >= max_train_steps:
        messages.append(
            f"--lr_warmup_steps {warmup}: the run has {max_train_steps} updates, so the rate never reaches "
            "--learning_rate. Use a shorter warm-up."
        )
    if schedule.lr_scheduler in DECAYING and schedule.length < max_train_steps:
        messages.append(
            f"--lr_schedule_steps {schedule.length}: the schedule ends {max_train_steps - schedule.length} updates "
            "before the run; after that the rate stays at or near 0."
        )
    return messages


def on_resume(schedule: Schedule, length_before: Optional[int], update: int) -> list[str]:
    """A warning if the schedule had another length (None: unknown), so that the rate jumps after `update` updates."""
    if schedule.lr_scheduler not in DECAYING or length_before in (None, schedule.length):
        return []
    before = schedule._replace(length=length_before)
    return [
        f"--max_train_steps: the checkpoint's {schedule.lr_scheduler} schedule has {length_before} updates, this run's "
        f"{schedule.length}; the rate of update {update + 1} would have been {before.rate(update):.2e} and is "
        f"{schedule.rate(update):.2e}. --lr_schedule_steps {length_before} keeps the old schedule."
    ]
