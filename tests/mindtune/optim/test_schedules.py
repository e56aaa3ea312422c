"""Schedules against closed forms."""

import math

import pytest

from mindtune.optim import schedules
from mindtune.optim.schedules import SCHEDULES, Schedule, Settings


def expected_factor(name, update, warmup, total, cycles, power, lr):
    """As transformers' optimization.py computes them, divided by the base rate as LambdaLR implies."""
    if name == "constant":
        return 1.0
    if update < warmup:
        return update / max(1, warmup)
    progress = (update - warmup) / max(1, total - warmup)
    return {
        "constant_with_warmup": 1.0,
        "linear": max(0.0, (total - update) / max(1, total - warmup)),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
        "cosine_with_restarts": 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1.0))),
        "polynomial": (1e-7 if update > total else (lr - 1e-7) * max(0.0, 1 - progress) ** power + 1e-7) / lr,
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup, total", [(0, 100), (10, 100), (99, 100), (0, 1), (500, 3)])
@pytest.mark.parametrize("cycles, power, lr", [(1, 1.0, 1e-4), (3, 2.0, 1.0)])
def test_schedules_at_their_boundaries(name, warmup, total, cycles, power, lr):
    schedule = Schedule(lr, total, name, warmup, cycles, power)
    updates = {0, 1, warmup - 1, warmup, warmup + 1, (warmup + total) // 2, total - 1, total}
    for update in sorted(update for update in updates if 0 <= update <= total):
        expected = expected_factor(name, update, warmup, total, cycles, power, lr)
        assert schedule.factor(update) == pytest.approx(expected, abs=1e-12), update
        assert schedule.rate(update) == pytest.approx(lr * expected, abs=1e-12), update


def test_schedules_by_hand():
    linear = Schedule(1.0, 12, "linear", 4)
    assert [linear.factor(k) for k in (0, 1, 2, 4, 8, 12)] == [0.0, 0.25, 0.5, 1.0, 0.5, 0.0]
    cosine = Schedule(1.0, 8, "cosine")
    assert [cosine.factor(k) for k in (0, 4, 8)] == pytest.approx([1.0, 0.5, 0.0])
    restarts = Schedule(1.0, 8, "cosine_with_restarts", lr_num_cycles=2)
    assert [restarts.factor(k) for k in (0, 2, 4, 6, 8)] == pytest.approx([1.0, 0.5, 1.0, 0.5, 0.0])
    polynomial = Schedule(1.0, 4, "polynomial", lr_power=2.0)
    assert [polynomial.factor(k) for k in (0, 2, 4)] == pytest.approx([1.0, 0.25, 0.0], abs=1e-6)


def test_polynomial_ends_at_1e_7_whatever_the_rate():
    assert Schedule(1e-4, 50, "polynomial").rate(50) == pytest.approx(1e-7)
    assert Schedule(1e-8, 50, "polynomial").factor(50) == 1.0
    assert Schedule(0.0, 50, "polynomial").factor(25) == 0.5


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule sine"):
        Schedule(1.0, 1, "sine").factor(0)


def test_a_run_creates_its_schedule_from_the_flags():
    settings = Settings(1e-3, lr_scheduler="linear", lr_warmup_steps=2)
    assert schedules.create(settings, 8, 100) == Schedule(1e-3, 100, "linear", 2)
    assert schedules.create(settings._replace(scale_lr=True), 8, 100).base == 8e-3
    assert schedules.create(settings._replace(lr_schedule_steps=50), 8, 100).length == 50
