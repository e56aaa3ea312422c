"""ZeRO stage 1: each worker has the optimizer's state of its share of the parameters, updates these, and sends them to the others.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054), section 5.1. A
parameter belongs to one worker as a whole, so that any optimizer will do that looks at one tensor at a time, and a checkpoint has the
same names and shapes as without.
"""

from __future__ import annotations

from typing import Callable

import mindspore as ms
from mindspore import nn, ops

from mindtune.cli import UserError
from mindtune.distributed import ranks


def check_flags(stage: int, distributed: bool, optimizer: str) -> None:
    """Raises UserError where --zero_stage does not go with the other flags."""
    if stage > 1:
        what = "gradients" if stage == 2 else "gradients and weights"
        raise UserError(
            f"--zero_stage {stage}: sharing out {what} takes ReduceScatter, which MindSpore lacks on the CPU, and mindone's helper for it "
            "belongs to another training step than this one. Use --zero_stage 1."
        )
    if stage and not distributed:
        raise UserError(
            "--zero_stage 1: shares the optimizer's state out over workers, and there is one. Add --distributed (see there)."
        )
    if stage and optimizer == "prodigy":
        raise UserError(
            "--zero_stage 1 with --optimizer prodigy: its step size needs sums over all parameters. Use another optimizer."
        )


def partition(sizes: list[int], workers: int) -> list[int]:
    """The worker that each of `sizes` goes to: the largest first, each to the one with the least so far."""
    owners, load = [0] * len(sizes), [0] * workers
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += sizes[index]
    return owners


class ShardedOptimizer(nn.Cell):
    """Stands for make(groups), of which this worker has its part. `groups` are dicts with "params", a list.

    Raises UserError if there are more workers than parameters.
    """

    def __init__(self, make: Callable[[list], nn.Optimizer], groups: list[dict]) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ms.ParameterTuple([p for group in groups for p in group["params"]])
        if len(self.parameters) < ranks.world_size():
            raise UserError(
                f"--zero_stage 1: {len(self.parameters)} parameters cannot be shared out over {ranks.world_size()} workers."
            )
        self.owners = tuple(partition([p.size for p in self.parameters], ranks.world_size()))
        self.own_indices = tuple(i for i, owner in enumerate(self.owners) if owner == ranks.rank())
        own = {id(self.parameters[i]) for i in self.own_indices}
        parts = [{**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups]
        self.own = make([part for part in parts if part["params"]])
        rates = iter({id(rate): rate for rate in self.own.learning_rate}.values())
        # One a group, as `optim.set_learning_rates` wants them; a group of which nothing is here has one that nobody reads.
        self.learning_rate = [
            next(rates) if part["params"] else ms.Parameter(ms.Tensor(0.0), name="unused") for part in parts
        ]
        self.broadcasts = [ops.Broadcast(number) for number in range(ranks.world_size())]

    def construct(self, gradients):
        own = ()
        for i in self.own_indices:
            own += (gradients[i],)
        self.own(own)
        # All workers exchange in one order: the first sends after all gradients have come, each of the others after the one before.
        done = gradients
        for i in range(len(self.parameters)):
            # A copy, for a graph moves a collective up to where its data is ready: the first parameter went out as it was before.
            fresh = ops.deepcopy(ops.depend(self.parameters[i], done))
            value = self.broadcasts[self.owners[i]]((fresh,))[0]
            done = ops.assign(self.parameters[i], value)
        return True
