"""ZeRO stage 1 in one process that plays each rank in turn. Real ranks: test_workers.py of the scripts."""

import mindspore as ms
import numpy as np
import pytest
import shared_optimizers
from mindspore import ops

from mindtune.cli import UserError
from mindtune.distributed import ranks
from mindtune.optim import zero1
from mindtune.optim.optimizers import optimizer_state, set_learning_rates


def state_bytes(optimizer):
    return sum(parameter.nbytes for parameter in optimizer_state(optimizer).values())


def test_parameters_are_partitioned_evenly():
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 10_000, 300)]
    for world_size in (1, 2, 3, 8):
        owners = zero1.partition(sizes, world_size)
        loads = [sum(size for size, owner in zip(sizes, owners) if owner == rank) for rank in range(world_size)]
        assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= min(sizes) + 100
    assert zero1.partition([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]
    assert zero1.partition([3, 3], 3) == [0, 1]


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(rank, world_size): makes this process that rank; a broadcast returns its own value."""

    def become(rank, world_size):
        monkeypatch.setattr(ranks, "_rank", rank)
        monkeypatch.setattr(ranks, "_world_size", world_size)
        monkeypatch.setattr(ops, "Broadcast", lambda owner: lambda values: values)

    return become


SHAPES = [(64, 80), (7,), (40, 200), (3, 5), (16, 16)]


def weights():
    """The same parameters in every call, in two groups with different rates and decays."""
    random = np.random.default_rng(1)
    values = [ms.Tensor(random.normal(size=shape), ms.float32) for shape in SHAPES]
    parameters = [ms.Parameter(value, name=f"w{i}") for i, value in enumerate(values)]
    groups = [
        {"params": parameters[:3], "lr": 0.1, "weight_decay": 0.01},
        {"params": parameters[3:], "lr": 0.2, "weight_decay": 0.0},
    ]
    return parameters, groups


@pytest.mark.parametrize(
    "name, eight_bit", [("adamw", False), ("adamw", True), ("adafactor", False), ("adamweightdecay", False)]
)
def test_the_ranks_together_do_what_one_optimizer_does(as_rank, name, eight_bit):
    """The parameters that a rank owns, its state, names in a checkpoint and share of the bytes, after three updates."""

    def create(groups):
        return shared_optimizers.create(name, groups, betas=(0.9, 0.99), eps=1e-6, eight_bit=eight_bit)

    def three_updates(optimizer):
        for k in range(3):
            random = [np.random.default_rng(10 * k + i) for i in range(len(SHAPES))]
            set_learning_rates(optimizer, [0.1 / (k + 1), 0.2 / (k + 1)])
            shared_optimizers.update(optimizer, [rng.normal(size=shape) for rng, shape in zip(random, SHAPES)])

    expected, groups = weights()
    whole = create(groups)
    three_updates(whole)
    states, sizes = {}, []
    for rank in range(2):
        as_rank(rank, 2)
        found, groups = weights()
        sharded = zero1.ShardedOptimizer(create, groups)
        three_updates(sharded)
        assert sharded.own_indices
        for i, (parameter, start) in enumerate(zip(found, weights()[0])):
            right = expected[i] if i in sharded.own_indices else start
            np.testing.assert_array_equal(parameter.asnumpy(), right.asnumpy())
        states.update({key: value.asnumpy() for key, value in optimizer_state(sharded).items()})
        sizes.append(state_bytes(sharded))
    right = {key: value.asnumpy() for key, value in optimizer_state(whole).items()}
    assert set(states) == set(right)
    for key in right:
        np.testing.assert_array_equal(states[key], right[key], err_msg=key)
    assert sum(sizes) == state_bytes(whole) + 4  # both ranks have the count of updates
    largest_tensor = 2 * 8 * 40 * 200
    assert max(sizes) <= max(largest_tensor, 0.6 * state_bytes(whole))


def test_a_group_without_parameters_on_a_rank(as_rank):
    """Its rate can be set with those of the other groups, and is not used."""
    as_rank(0, 2)
    parameters = [ms.Parameter(ms.Tensor(np.ones((4, size)), ms.float32), name=f"p{size}") for size in (9, 8)]
    groups = [{"params": [parameter], "lr": 0.5, "weight_decay": 0.0} for parameter in reversed(parameters)]
    sharded = zero1.ShardedOptimizer(lambda own: shared_optimizers.create("adamw", own), groups)
    set_learning_rates(sharded, [0.25, 0.125])
    assert sharded.own_indices == (1,) and float(sharded.own.learning_rate[0]) == 0.125


def test_more_ranks_than_parameters_are_refused(as_rank):
    as_rank(0, 6)
    with pytest.raises(UserError, match="5 parameters cannot be sharded over 6 ranks"):
        zero1.ShardedOptimizer(lambda groups: None, weights()[1])
