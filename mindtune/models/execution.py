"""How models run: graph mode or PyNative, evaluation mode, and memory that is given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import mindspore as ms
from mindspore import nn

from mindtune.models.library import pynative_no_grad


@contextlib.contextmanager
def pynative():
    """PyNative for a while: pictures and held-out losses need no compiled graph of their own, and their memory is given back."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with pynative_no_grad():
            yield
    finally:
        ms.set_context(mode=mode)


@contextlib.contextmanager
def eval_mode(*trained: nn.Cell):
    """The trained models without dropout, in PyNative, recording nothing for a backward pass."""
    marks = [model.requires_grad for model in trained]
    with pynative():
        for model in trained:
            # mindone's TrainStep marks its model: every call would begin a graph for a backward pass, which stays for good.
            model.set_train(False).set_grad(False)
        yield
        for model, mark in zip(trained, marks):
            model.set_train(True).set_grad(mark)


def free_memory() -> None:
    """What nothing refers to any more goes back to the system: Python collects it, and glibc, where there is one, keeps none of it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def set_up_device(graph_mode: bool) -> None:
    """Graph mode or PyNative. On the CPU PyNative launches blocking: handing every operator to a thread costs 7x the time."""
    ms.set_context(mode=ms.GRAPH_MODE if graph_mode else ms.PYNATIVE_MODE)
    if ms.get_context("device_target") == "CPU":
        ms.runtime.launch_blocking()
