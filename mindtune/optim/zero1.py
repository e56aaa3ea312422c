"""ZeRO stage 1: the optimizer state is sharded over the ranks.

Each rank keeps the state of its shard of the parameters, updates that shard, and sends it to the other ranks.
Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054),
section 5.1. A shard consists of whole parameters. Therefore it works with every optimizer that updates each tensor
independently, and checkpoints have the same names and shapes as without ZeRO.
"""

from __future__ import annotations

from typing import Callable

import mindspore as ms
from mindspore import nn, ops

from mindtune.cli import UserError
from mindtune.distributed import ranks


def check_flags(stage: int, distributed: bool, optimizer: str) -> None:
    """Raises UserError if --zero_stage does not work with the other flags."""
    if stage > 1:
        sharded = "gradients" if stage == 2 else "gradients and weights"
        raise UserError(
            f"--zero_stage {stage}: sharding {sharded} needs ReduceScatter, which MindSpore does not have on the "
            "CPU, and mindone's helper for it works only with mindone's own training step. Use --zero_stage 1."
        )
    if stage and not distributed:
        raise UserError(
            "--zero_stage 1: shards the optimizer state over several ranks. Add --distributed (see its help)."
        )
    if stage and optimizer == "prodigy":
        raise UserError(
            "--zero_stage 1 with --optimizer prodigy: its step size needs sums over all parameters. Use another "
            "optimizer."
        )


def partition(sizes: list[int], world_size: int) -> list[int]:
    """The rank that owns each parameter: the largest of `sizes` first, each goes to the rank with the smallest sum."""
    owners = [0] * len(sizes)
    load = [0] * world_size
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += sizes[index]
    return owners


class ShardedOptimizer(nn.Cell):
    """The optimizer `create(groups)` with its state sharded over the ranks. `groups` are dicts with "params", a list.

    Raises UserError if there are more ranks than parameters.
    """

    def __init__(self, create: Callable[[list], nn.Optimizer], groups: list[dict]) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ms.ParameterTuple([p for group in groups for p in group["params"]])
        if len(self.parameters) < ranks.world_size():
            raise UserError(
                f"--zero_stage 1: {len(self.parameters)} parameters cannot be sharded over {ranks.world_size()} "
                "ranks. Use fewer devices."
            )
        self.owners = tuple(partition([p.size for p in self.parameters], ranks.world_size()))
        self.own_indices = tuple(i for i, owner in enumerate(self.owners) if owner == ranks.rank())
        own = {id(self.parameters[i]) for i in self.own_indices}
        own_groups = [{**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups]
        self.own = create([group for group in own_groups if group["params"]])
        rates = iter({id(rate): rate for rate in self.own.learning_rate}.values())
        # One per group, as `set_learning_rates` expects; a group without parameters on this rank has an unused one.
        self.learning_rate = [
            next(rates) if group["params"] else ms.Parameter(ms.Tensor(0.0), name="unused") for group in own_groups
        ]
        self.broadcasts = [ops.Broadcast(rank) for rank in range(ranks.world_size())]

    def construct(self, gradients):
        own = ()
        for i in self.own_indices:
            own += (gradients[i],)
        self.own(own)
        # All ranks send the parameters in the same order: the first after all gradients have arrived, every other
        # after its predecessor.
        previous = gradients
        for i in range(len(self.parameters)):
            # A copy, because a graph runs a collective as soon as its input is ready: it would send the first
            # parameter before its update.
            updated = ops.deepcopy(ops.depend(self.parameters[i], previous))
            value = self.broadcasts[self.owners[i]]((updated,))[0]
            previous = ops.assign(self.parameters[i], value)
        return True
