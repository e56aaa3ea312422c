"""Switching to PyNative and to evaluation mode, and the memory that validation leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from mindtune.models.execution import eval_mode, free_memory, pynative


@pytest.mark.parametrize("fails", [False, True])
def test_pynative_restores_the_mode(mode, fails):
    with pytest.raises(ZeroDivisionError if fails else StopIteration), pynative():
        assert ms.get_context("mode") == ms.PYNATIVE_MODE
        _ = 1 / 0 if fails else next(iter(()))
    assert ms.get_context("mode") == mode


class DeepModel(nn.Cell):
    """Sixty small layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.CellList([nn.Dense(8, 8) for _ in range(60)])

    def construct(self, x):
        for layer in self.layers:
            x = ops.tanh(layer(x))
        return x


def own_kilobytes():
    free_memory()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_validation_leaves_no_memory_behind():
    """With a model that TrainStep has marked for gradients. Outside eval_mode every call keeps 5 kB of a graph."""
    model, x = DeepModel().set_train(True).set_grad(True), ms.Tensor(np.ones((2, 8), np.float32))

    def memory_after(calls):
        for _ in range(calls):
            with eval_mode(model):
                model(x).asnumpy()
        return own_kilobytes()

    memory_after(50)
    before = memory_after(50)
    assert memory_after(250) - before < 400
    assert model.requires_grad and model.training


FREED = """
import re
from mindtune.models.execution import free_memory

def megabytes():
    return int(re.search("RssAnon:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1]) / 1024

blocks = [bytearray(10_000) for _ in range(20_000)]
del blocks[1::2], blocks[1::2]  # what is left lies everywhere in between
before = megabytes()
free_memory()
print(before - megabytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("library", ["", "libjemalloc.so.2"], ids=["glibc", "jemalloc"])
def test_freed_memory_goes_back_to_the_system(library):
    """Most of 150 MB, in between blocks of 50 MB that stay. `make test` preloads MindSpore's jemalloc, users do not."""
    preload = str(Path(ms.__file__).parent / "lib" / library) if library else ""
    done = subprocess.run(
        [sys.executable, "-c", FREED], env={**os.environ, "LD_PRELOAD": preload}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert float(done.stdout.splitlines()[-1]) > 75
