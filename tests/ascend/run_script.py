"""Runs a training script on the simulated device, and writes what every update cost as JSON.

    python tests/ascend/run_script.py [--rank 1 --world_size 8] [--break NAME] UPDATES.json script.py flags ...

The file has a list with a dict per update: bytes of the step's inputs, bytes copied from host to device and back since
the last update, and bytes of device memory after it. Works for inference scripts too: then the list is empty. The last
item is for the time after the last update. The record of operators (ASCEND_RECORD) gets a line "update" after each.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import runpy
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.communication import init

from mindtune.distributed import ranks
from mindtune.models import ascend_ops, cpu_ops
from mindtune.models.train_step import TrainStep
from mindtune.run.record import Run

STAND_INS = ctypes.CDLL(str(Path(os.environ["ASCEND_HOME_PATH"], "lib64", "libcannstub.so")))
STAND_INS.copied_bytes.restype = ctypes.c_uint64
TO_DEVICE, TO_HOST = 1, 2


class Meter:
    """Counts bytes between updates."""

    def __init__(self):
        self.updates = []
        self.inputs = self.trained = 0
        self.start = self.copied()

    def copied(self):
        return [STAND_INS.copied_bytes(kind) for kind in (TO_DEVICE, TO_HOST)]

    def update(self):
        """Ends an update."""
        now = self.copied()
        self.updates.append({
            "inputs": self.inputs,
            "to_device": now[0] - self.start[0],
            "to_host": now[1] - self.start[1],
            "memory": ms.runtime.memory_allocated(),
            "trained": self.trained,
        })  # fmt: skip
        STAND_INS.record_mark(b"update")
        self.start, self.inputs = now, 0


def measure(meter, broken):
    """Makes the loop of a training script report to `meter`, and call `broken` before every step."""
    call, update = TrainStep.__call__, Run.update

    def counted_call(self, *inputs):
        meter.inputs += sum(value.nbytes for value in inputs)
        meter.trained = sum(parameter.nbytes for parameter in self.optimizer.parameters)
        broken()
        return call(self, *inputs)

    def counted_update(self, *values, **named):
        update(self, *values, **named)
        meter.update()

    TrainStep.__call__, Run.update = counted_call, counted_update


def be_rank(rank, world_size):
    """Makes `ranks.set_up` join a job whose other ranks say what this one says.

    At simulation level 3, MindSpore has no collectives and asks for no other process.
    """
    os.environ.update(MS_SIMULATION_LEVEL="3", RANK_ID=str(rank), RANK_SIZE=str(world_size))

    def set_up(distributed):
        init()
        ranks._rank, ranks._world_size = rank, world_size
        ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True)

    ranks.set_up = set_up
    ranks.all_gather = lambda value=None: [value] * world_size
    ranks.gather_parameters = lambda parameters: {}


# ---- negative controls ----


def attend_without_flash(q, k, v):
    return cpu_ops.attention(q, k, v)


@ms.jit
def unknown_to_ascend(x):
    return ops.bessel_j0(x)


kept = []
IMAGE = np.ones((64, 64), np.float32)
BREAKS = {
    "float64": lambda: ops.square(ms.Tensor(IMAGE, ms.float64)),
    "half": lambda: ops.square(ms.Tensor(IMAGE, ms.float16)),
    "fallback": lambda: unknown_to_ascend(ms.Tensor(IMAGE)),
    "copies": lambda: ops.square(ms.Tensor(IMAGE)),
    "back": lambda: ops.square(ms.Tensor(1.0)).broadcast_to((64, 64)).asnumpy(),
    "memory": lambda: kept.append(ops.square(ms.Tensor(1.0)).broadcast_to((64, 64)) + 1.0),
    "old operator": lambda: ops.bias_add(ms.Tensor(IMAGE), ms.Tensor(IMAGE[0])),
    "attention": lambda: setattr(ascend_ops, "attention", attend_without_flash),
}


def main():
    parser = argparse.ArgumentParser(description="Runs a script on the simulated device.")
    parser.add_argument("updates", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--break", dest="broken", choices=BREAKS)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.rank is not None:
        be_rank(args.rank, args.world_size)
    # UniPC solves equations whose coefficients it has computed on the device: here they are zeros.
    np.linalg.solve = lambda matrix, right: np.zeros_like(right)
    meter = Meter()
    measure(meter, BREAKS.get(args.broken, lambda: None))
    script, *flags = args.command
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        meter.update()
        args.updates.write_text(json.dumps(meter.updates))


if __name__ == "__main__":
    main()
