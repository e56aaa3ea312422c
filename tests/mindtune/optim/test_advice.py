"""Messages about settings that will not train well."""

import pytest

from mindtune.optim.advice import on_resume, on_schedule, on_settings
from mindtune.optim.schedules import Schedule

GOOD = Schedule(1e-4, 100, "cosine", 10)


@pytest.mark.parametrize(
    "optimizer, schedule",
    [
        ("adamw", GOOD),
        ("prodigy", GOOD._replace(base=1.0)),
        ("adamw", GOOD._replace(lr_scheduler="constant", lr_warmup_steps=500)),  # constant has no warm-up
        ("adamw", GOOD._replace(length=200)),
        ("adamw", GOOD._replace(lr_scheduler="constant_with_warmup", length=50)),
    ],
)
def test_usual_settings_get_no_message(optimizer, schedule):
    assert on_settings(optimizer, schedule, 100) == []


@pytest.mark.parametrize(
    "optimizer, schedule, start",
    [
        ("prodigy", GOOD, "--learning_rate 0.0001 with --optimizer prodigy: "),
        ("prodigy", GOOD._replace(base=0.1), "--learning_rate 0.1 with --optimizer prodigy: "),
        ("adamw", GOOD._replace(base=1.0), "--learning_rate 1 with --optimizer adamw: "),
        ("adamw", GOOD._replace(lr_warmup_steps=100), "--lr_warmup_steps 100: the run has 100 updates"),
        (
            "adamw",
            GOOD._replace(lr_scheduler="constant_with_warmup", lr_warmup_steps=500),
            "--lr_warmup_steps 500: the run has 100 updates",
        ),
        ("adamw", GOOD._replace(length=60), "--lr_schedule_steps 60: the schedule ends 40 updates before the run"),
    ],
)
def test_a_message(optimizer, schedule, start):
    (message,) = on_settings(optimizer, schedule, 100)
    assert message.startswith(start)


def test_a_decaying_schedule_resumed_with_another_length():
    """A cosine of 6 updates is at its end after 6, one of 12 half way: cos(pi) and cos(pi / 2) by hand."""
    (message,) = on_resume(Schedule(1e-4, 12, "cosine"), 6, 6)
    assert "would have been 0.00e+00 and is 5.00e-05" in message
    assert "--lr_schedule_steps 6 keeps the old schedule" in message
    (message,) = on_resume(Schedule(1.0, 20, "linear"), 10, 5)
    assert "would have been 5.00e-01 and is 7.50e-01" in message
    state = {"lr_schedule_steps": 10, "global_step": 5}
    assert on_schedule("prodigy", Schedule(1.0, 20, "linear"), 20, state) == [message]


@pytest.mark.parametrize(
    "name, before", [("constant", 6), ("constant_with_warmup", 6), ("cosine", 12), ("cosine", None)]
)
def test_a_schedule_that_continues_unchanged(name, before):
    """A checkpoint of 0.1.0 does not record the length of its schedule."""
    assert on_resume(Schedule(1e-4, 12, name), before, 6) == []
