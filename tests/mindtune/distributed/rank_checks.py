"""What tests/flux_lora/test_workers.py checks with two real ranks under msrun, in graph mode as training uses it.

The scheduler runs this script too, so it imports mindone only after set_up.
"""

import os
import sys
import time

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.distributed import ranks
from mindtune.models import execution


def make_step():
    """A weight of three elements whose gradient is the input, and its loss scaler."""
    from mindtune.models import library, precision

    class Step(library.TrainStep):
        def __init__(self, model, optimizer, scaler):
            super().__init__(model, optimizer, loss_scaler=scaler, gradient_accumulation_steps=1)
            self.grad_clipper = precision.GradNormClipper(0.0)

        def forward(self, x):
            loss = (self.model.weight * x).sum()
            return self.scale_loss(loss), loss

    class Weight(nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = ms.Parameter(ms.Tensor(np.ones(3), ms.float32), name="weight")

    model = Weight()
    scaler = precision.loss_scaler("fp16")
    return Step(model, nn.SGD([model.weight], learning_rate=1.0), scaler), model, scaler


def check_gather_parameters():
    """Values of every dtype arrive on the main process bit for bit; other ranks get none."""
    rank = ranks.rank()
    random = np.random.default_rng(0)
    values = {
        "both": np.float32([rank]),
        "codes": random.integers(0, 256, (3, 7)).astype(np.uint8),
        "half": random.normal(size=5).astype(np.float16),
        "scalar": np.array(np.float32(np.nan)),
        "count": np.int32([2**31 - 1]),
        "large": random.normal(size=(300, 400)).astype(np.float32),
    }
    own = {name: value for name, value in values.items() if rank == 1 or name == "both"}
    found = ranks.gather_parameters({name: ms.Parameter(ms.Tensor(value), name=name) for name, value in own.items()})
    if rank:
        assert found == {}
        return
    assert set(found) == set(values)
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def check_steps():
    """Gradients are averaged, and an overflow on one rank skips the update and halves the scale on both."""
    step, model, scaler = make_step()
    for rows, weight, scale in (
        ([[1, 2, 3], [3, 2, 5]], [-1, -1, -3], 2.0**16),
        ([[1, 2, 3], [np.inf, 0, 0]], [-1, -1, -3], 2.0**15),
    ):
        (inputs,) = ranks.micro_batches(step, iter([(np.float32(rows[ranks.rank()]),)]), 1)
        step(*inputs)
        assert model.weight.asnumpy().tolist() == weight and float(scaler.scale_value) == scale


def check_long_wait():
    """all_gather waits longer than the 30 seconds of MindSpore's collectives on the CPU, which work afterwards."""
    if ranks.is_main_process():
        time.sleep(33)
    ranks.all_gather()
    assert ops.AllReduce()(ms.Tensor(np.float32([ranks.rank() + 1]))).asnumpy().tolist() == [3.0]


if __name__ == "__main__":
    execution.set_up_device(graph_mode=True)
    ranks.set_up("--distributed" in sys.argv)
    processes = ranks.all_gather([ranks.rank(), os.getpid()])
    assert ranks.world_size() == 2 and [rank for rank, _ in processes] == [0, 1]
    assert len({pid for _, pid in processes}) == 2 and processes[ranks.rank()][1] == os.getpid()
    check_gather_parameters()
    check_steps()
    check_long_wait()
    print("all checks passed", file=sys.stderr)
    ranks.finish()
