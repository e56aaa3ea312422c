"""Learning-rate schedules against their closed forms."""

import math

import pytest

from mindtune.optim.schedules import schedule_factor


def expected_factor(name, update, warmup, total, cycles, power, lr):
    """The formulas of transformers' optimization.py, divided by the base rate as LambdaLR does."""
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


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
@pytest.mark.parametrize("warmup, total", [(0, 100), (10, 100), (99, 100), (0, 1), (500, 3)])
@pytest.mark.parametrize("cycles, power, lr", [(1, 1.0, 1e-4), (3, 2.0, 1.0)])
def test_schedules_at_their_boundaries(name, warmup, total, cycles, power, lr):
    updates = {0, 1, warmup - 1, warmup, warmup + 1, (warmup + total) // 2, total - 1, total}
    for update in sorted(update for update in updates if 0 <= update <= total):
        found = schedule_factor(name, update, warmup, total, cycles, power, lr)
        assert found == pytest.approx(expected_factor(name, update, warmup, total, cycles, power, lr), abs=1e-12), (
            update
        )


def test_schedules_at_points_computed_by_hand():
    assert [schedule_factor("linear", k, 4, 12) for k in (0, 1, 2, 4, 8, 12)] == [0.0, 0.25, 0.5, 1.0, 0.5, 0.0]
    assert [schedule_factor("cosine", k, 0, 8) for k in (0, 4, 8)] == pytest.approx([1.0, 0.5, 0.0])
    assert [schedule_factor("cosine_with_restarts", k, 0, 8, 2) for k in (0, 2, 4, 6, 8)] == pytest.approx(
        [1.0, 0.5, 1.0, 0.5, 0.0]
    )
    assert [schedule_factor("polynomial", k, 0, 4, power=2.0, lr=1.0) for k in (0, 2, 4)] == pytest.approx(
        [1.0, 0.25, 0.0], abs=1e-6
    )


def test_polynomial_ends_at_1e_7_for_any_base_rate():
    assert 1e-4 * schedule_factor("polynomial", 50, 0, 50, lr=1e-4) == pytest.approx(1e-7)
    assert schedule_factor("polynomial", 50, 0, 50, lr=1e-8) == 1.0
    assert schedule_factor("polynomial", 25, 0, 50, lr=0.0) == 0.5


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule sine"):
        schedule_factor("sine", 0, 0, 1)
