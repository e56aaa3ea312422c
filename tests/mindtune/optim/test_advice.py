"""Messages about settings that will not train well, and no message about others."""

import pytest

from mindtune.optim.advice import on_resumed_schedule, on_settings

GOOD = {
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 10,
    "schedule_steps": 100,
    "max_train_steps": 100,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"schedule": "constant", "warmup_steps": 500},  # constant has no warm-up
        {"schedule_steps": 200},
        {"schedule": "constant_with_warmup", "schedule_steps": 50},
    ],
)
def test_usual_settings_get_no_message(changes):
    assert on_settings(**{**GOOD, **changes}) == []


@pytest.mark.parametrize(
    "changes, begin",
    [
        ({"optimizer": "prodigy"}, "--learning_rate 0.0001 with --optimizer prodigy: "),
        ({"optimizer": "prodigy", "learning_rate": 0.1}, "--learning_rate 0.1 with --optimizer prodigy: "),
        ({"learning_rate": 1.0}, "--learning_rate 1 with --optimizer adamw: "),
        ({"warmup_steps": 100}, "--lr_warmup_steps 100: the run has 100 updates"),
        ({"schedule": "constant_with_warmup", "warmup_steps": 500}, "--lr_warmup_steps 500: the run has 100 updates"),
        ({"schedule_steps": 60}, "--lr_schedule_steps 60: the schedule ends 40 updates before the run"),
    ],
)
def test_a_message_names_the_flag_and_its_value(changes, begin):
    (message,) = on_settings(**{**GOOD, **changes})
    assert message.startswith(begin)


def test_a_decaying_schedule_resumed_with_another_length():
    """A cosine over 6 updates is at its end after 6; over 12 it is half way: cos(pi) and cos(pi / 2) by hand."""
    (message,) = on_resumed_schedule("cosine", 6, 12, 6, 1e-4, 0, 1, 1.0)
    assert (
        "would have been 0.00e+00 and is 5.00e-05" in message
        and "--lr_schedule_steps 6 keeps the old schedule" in message
    )
    (message,) = on_resumed_schedule("linear", 10, 20, 5, 1.0, 0, 1, 1.0)
    assert "would have been 5.00e-01 and is 7.50e-01" in message


@pytest.mark.parametrize(
    "schedule, before", [("constant", 6), ("constant_with_warmup", 6), ("cosine", 12), ("cosine", None)]
)
def test_a_schedule_that_is_unchanged_gets_no_message(schedule, before):
    """A checkpoint of version 0.1.0 does not record the length of its schedule: None."""
    assert on_resumed_schedule(schedule, before, 12, 6, 1e-4, 0, 1, 1.0) == []
