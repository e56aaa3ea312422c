"""How models run: graph mode or PyNative, evaluation mode, and freeing memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import mindspore as ms
from mindspore import nn

from mindtune.models.fast_ops import ON_CPU
from mindtune.models.library import pynative_no_grad


@contextlib.contextmanager
def pynative():
    """Switches to PyNative without gradients.

    Validation images and held-out losses need no compiled graph, whose memory stays.
    """
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with pynative_no_grad():
            yield
    finally:
        ms.set_context(mode=mode)


@contextlib.contextmanager
def eval_mode(*trained: nn.Cell):
    """Runs the trained models in PyNative without dropout and without recording a backward pass."""
    requires_grad = [model.requires_grad for model in trained]
    with pynative():
        for model in trained:
            # mindone's TrainStep calls set_grad on its model: every call would record a graph that is never freed.
            model.set_train(False).set_grad(False)
        yield
        for model, value in zip(trained, requires_grad):
            model.set_train(True).set_grad(value)


def free_memory() -> None:
    """Returns unused memory to the system: collects garbage, and makes glibc or jemalloc release what they keep."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):  # jemalloc, preloaded
        library.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))  # 4096: of all arenas
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def set_up_device(graph_mode: bool) -> None:
    """Sets graph mode or PyNative.

    On the CPU, operators launch synchronously: a thread for each takes 7 times as long. On Ascend, convolutions of
    float32 compute in float32: MindSpore's default there is HF32, which has 11 bits of mantissa.
    """
    ms.set_context(mode=ms.GRAPH_MODE if graph_mode else ms.PYNATIVE_MODE)
    if ON_CPU:
        ms.runtime.launch_blocking()
    else:
        ms.device_context.ascend.op_precision.conv_allow_hf32(False)
