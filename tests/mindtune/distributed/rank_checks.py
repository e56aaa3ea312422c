"""What two real workers check of `mindtune.distributed.ranks`; started by test_devices.py under msrun. Graph mode, as a training step would be."""

import os
import sys
import time

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.distributed import ranks
from mindtune.models import execution, library, precision


class Step(library.TrainStep):
    """A weight of three numbers whose gradient is the input."""

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


def check_collect():
    """Values of every type arrive bit for bit, those of the first worker unsent, on the first worker alone."""
    me = ranks.rank()
    random = np.random.default_rng(0)
    values = {
        "both": np.float32([me]),
        "codes": random.integers(0, 256, (3, 7)).astype(np.uint8),
        "half": random.normal(size=5).astype(np.float16),
        "scalar": np.array(np.float32(np.nan)),
        "count": np.int32([2**31 - 1]),
        "large": random.normal(size=(300, 400)).astype(np.float32),
    }
    own = {
        name: ms.Parameter(ms.Tensor(value), name=name) for name, value in values.items() if me == 1 or name == "both"
    }
    found = ranks.gather_parameters(own)
    if me:
        assert found == {}
        return
    assert set(found) == set(values)
    for name, value in values.items():
        assert (
            found[name].dtype == value.dtype
            and found[name].shape == value.shape
            and found[name].tobytes() == value.tobytes()
        ), name


def check_steps():
    """Gradients are averaged, and an overflow on one worker skips the update and halves the scale on both."""
    me, model = ranks.rank(), Weight()
    scaler = precision.loss_scaler("fp16")
    step = Step(model, nn.SGD([model.weight], learning_rate=1.0), scaler)
    for rows, weight, scale in (
        ([[1, 2, 3], [3, 2, 5]], [-1, -1, -3], 2.0**16),
        ([[1, 2, 3], [np.inf, 0, 0]], [-1, -1, -3], 2.0**15),
    ):
        (inputs,) = ranks.micro_batches(step, iter([(np.float32(rows[me]),)]), 1)
        step(*inputs)
        assert model.weight.asnumpy().tolist() == weight and float(scaler.scale_value) == scale


def check_waiting():
    """For longer than MindSpore's collectives would wait on the CPU, and they work afterwards."""
    if ranks.is_main_process():
        time.sleep(33)
    ranks.all_gather()
    assert ops.AllReduce()(ms.Tensor(np.float32([ranks.rank() + 1]))).asnumpy().tolist() == [3.0]


if __name__ == "__main__":
    execution.set_up_device(graph_mode=True)
    ranks.set_up("--distributed" in sys.argv)
    said = ranks.all_gather([ranks.rank(), os.getpid()])
    assert ranks.world_size() == 2 and [worker for worker, _ in said] == [0, 1] and len({pid for _, pid in said}) == 2
    assert said[ranks.rank()][1] == os.getpid()
    check_collect()
    check_steps()
    check_waiting()
    print("all checks passed", file=sys.stderr)
    ranks.finish()
