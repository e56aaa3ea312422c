"""What is said of settings with which a run will disappoint, and of none else."""

import pytest

from mindtune.encode.encoder_stage import long_captions_message
from mindtune.optim.advice import on_resumed_schedule, on_settings

GOOD = {
    "optimizer": "adamw", "learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 10, "schedule_steps": 100, "max_train_steps": 100,
}  # fmt: skip


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
def test_usual_settings_get_no_sentence(changes):
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
def test_a_sentence(changes, begin):
    (said,) = on_settings(**{**GOOD, **changes})
    assert said.startswith(begin)


def test_a_decaying_schedule_resumed_with_another_length():
    """Cosine over 6 updates without warm-up is at its end after them; over 12 half way: cos(pi / 2) and cos(pi) by hand."""
    (said,) = on_resumed_schedule("cosine", 6, 12, 6, 1e-4, 0, 1, 1.0)
    assert "would have been 0.00e+00 and is 5.00e-05" in said and "--lr_schedule_steps 6 keeps the old schedule" in said
    (said,) = on_resumed_schedule("linear", 10, 20, 5, 1.0, 0, 1, 1.0)
    assert "would have been 5.00e-01 and is 7.50e-01" in said


@pytest.mark.parametrize(
    "schedule, before", [("constant", 6), ("constant_with_warmup", 6), ("cosine", 12), ("cosine", None)]
)
def test_a_schedule_that_goes_on_as_it_was(schedule, before):
    """A checkpoint of 0.1.0 does not say how long its schedule was."""
    assert on_resumed_schedule(schedule, before, 12, 6, 1e-4, 0, 1, 1.0) == []


def test_captions_that_are_cut_off():
    assert long_captions_message([3, 77, 20], 77, "CLIP") == []
    (said,) = long_captions_message([78, 5, 120], 77, "CLIP")
    assert said.startswith("2 captions are longer than CLIP reads: 77 tokens, the longest has 120.")
    (said,) = long_captions_message(iter([600]), 256, "T5", "--max_sequence_length")
    assert said.startswith("1 caption is longer than T5 reads") and "Raise --max_sequence_length" in said
