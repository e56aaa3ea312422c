"""ZeRO stage 1 in one process that takes each worker's part in turn (real ones: test_workers.py of the scripts)."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from mindtune.cli import UserError
from mindtune.distributed import ranks
from mindtune.optim import zero1
from mindtune.optim.optimizers import Settings, create_optimizer, optimizer_state, set_learning_rates, state_bytes


def test_the_load_is_even():
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 10_000, 300)]
    for workers in (1, 2, 3, 8):
        owners = zero1.partition(sizes, workers)
        loads = [sum(size for size, owner in zip(sizes, owners) if owner == worker) for worker in range(workers)]
        assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= min(sizes) + 100
    assert zero1.partition([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]
    assert zero1.partition([3, 3], 3) == [0, 1]


@pytest.fixture
def as_worker(monkeypatch):
    """as_worker(number, count): this process takes that worker's part; what it would send to others stays where it is."""

    def become(number, count):
        monkeypatch.setattr(ranks, "_worker", number)
        monkeypatch.setattr(ranks, "_count", count)
        monkeypatch.setattr(ops, "Broadcast", lambda owner: lambda values: values)

    return become


SHAPES = [(64, 80), (7,), (40, 200), (3, 5), (16, 16)]


def weights():
    """The same parameters every time, in two groups with rates and decays of their own."""
    random = np.random.default_rng(1)
    parameters = [
        ms.Parameter(ms.Tensor(random.normal(size=shape), ms.float32), name=f"w{i}") for i, shape in enumerate(SHAPES)
    ]
    groups = [
        {"params": parameters[:3], "lr": 0.1, "weight_decay": 0.01},
        {"params": parameters[3:], "lr": 0.2, "weight_decay": 0.0},
    ]
    return parameters, groups


@pytest.mark.parametrize(
    "name, eight_bit", [("adamw", False), ("adamw", True), ("adafactor", False), ("adamweightdecay", False)]
)
def test_each_workers_part_is_what_the_whole_would_do(as_worker, name, eight_bit):
    """The parameters it owns, their state, its names in a checkpoint and its share of the bytes, after three updates."""

    settings = Settings(name, eight_bit, adam_beta2=0.99, adam_epsilon=1e-6)

    def make(groups):
        return create_optimizer(settings, groups)

    def three_updates(optimizer):
        for update in range(3):
            set_learning_rates(optimizer, [0.1 / (update + 1), 0.2 / (update + 1)])
            optimizer(
                tuple(
                    ms.Tensor(np.random.default_rng(10 * update + i).normal(size=s), ms.float32)
                    for i, s in enumerate(SHAPES)
                )
            )

    expected, groups = weights()
    whole = make(groups)
    three_updates(whole)
    parts, sizes = {}, []
    for worker in range(2):
        as_worker(worker, 2)
        found, groups = weights()
        shared = zero1.ShardedOptimizer(make, groups)
        three_updates(shared)
        assert shared.own_indices
        for i, parameter in enumerate(found):
            start = weights()[0][i]
            np.testing.assert_array_equal(
                parameter.asnumpy(), (expected[i] if i in shared.own_indices else start).asnumpy()
            )
        parts.update({key: value.asnumpy() for key, value in optimizer_state(shared).items()})
        sizes.append(state_bytes(shared))
    right = {key: value.asnumpy() for key, value in optimizer_state(whole).items()}
    assert set(parts) == set(right)
    for key in right:
        np.testing.assert_array_equal(parts[key], right[key], err_msg=key)
    largest = 2 * 8 * 40 * 200
    assert sum(sizes) == state_bytes(whole) + 4 and max(sizes) <= max(
        largest, 0.6 * state_bytes(whole)
    )  # the count of updates is on both


def test_a_group_of_which_a_worker_has_nothing(as_worker):
    """Its rate is set with the others' and read by nobody."""
    as_worker(0, 2)
    parameters = [ms.Parameter(ms.Tensor(np.ones((4, size)), ms.float32), name=f"p{size}") for size in (9, 8)]
    groups = [{"params": [parameter], "lr": 0.5, "weight_decay": 0.0} for parameter in reversed(parameters)]
    shared = zero1.ShardedOptimizer(lambda parts: create_optimizer(Settings(), parts), groups)
    set_learning_rates(shared, [0.25, 0.125])
    assert shared.own_indices == (1,) and float(shared.own.learning_rate[0]) == 0.125


def test_more_workers_than_parameters_are_refused(as_worker):
    as_worker(0, 6)
    with pytest.raises(UserError, match="5 parameters cannot be sharded over 6"):
        zero1.ShardedOptimizer(lambda groups: None, weights()[1])
