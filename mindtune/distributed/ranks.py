"""The ranks of a data-parallel job, one device each: this process's rank, and what ranks exchange besides gradients.

msrun starts the job. With one rank, or without msrun, every function here returns at once.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.cli import UserError
from mindtune.distributed.rendezvous import Connection

_connection: Optional[Connection] = None
_rank = 0
_world_size = 1


def set_up(distributed: bool) -> None:
    """Joins the data-parallel job that msrun started.

    Call it after the mode is set and before anything is printed or written. All ranks but the main process print
    nothing on stdout. In msrun's scheduler, which runs the script too, this does not return. Raises UserError if msrun
    is used without `distributed`, or `distributed` without msrun.
    """
    role = os.environ.get("MS_ROLE")
    if distributed and role:
        _join(role)
    elif distributed:
        command = shlex.join(
            ["msrun", "--worker_num=2", "--local_worker_num=2", "--join=True", "--log_dir=workers", *sys.argv]
        )
        raise UserError(
            "--distributed: start the script with msrun, which starts one process per device. For two devices:\n"
            f"  {command}\nThe command contains the number of devices twice."
        )
    elif role:
        raise UserError(
            "msrun started this script without --distributed: every process would train on its own. Add --distributed."
        )


def _join(role: str) -> None:
    global _connection, _rank, _world_size
    from mindspore.communication import get_group_size, get_rank, init

    host = os.environ["MS_SCHED_HOST"]
    port = int(os.environ["MS_SCHED_PORT"]) + 1
    world_size = os.environ["MS_WORKER_NUM"]
    if role == "MS_SCHED":
        # A separate process: the scheduler's init() returns when the job ends, and no Python code runs until then.
        server = str(Path(__file__).with_name("rendezvous.py"))
        subprocess.Popen([sys.executable, server, host, str(port), world_size])
        init()
        sys.exit(0)
    init()
    _rank, _world_size = get_rank(), get_group_size()
    ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True)
    try:
        _connection = Connection(host, port, _rank, on_lost=_exit_after_loss)
    except OSError as error:
        raise UserError(
            f"cannot connect to {host}:{port}, the port after msrun's --master_port, which the ranks use to exchange "
            f"messages: {error}. Give another --master_port."
        ) from None
    print(
        f"{_world_size} ranks; rank 0 is process {os.getpid()}. kill -TERM of that process stops the job with a "
        "checkpoint, Ctrl-C stops it without one."
    )
    if _rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (stays open until the process ends)


def _exit_after_loss(lost: str) -> None:
    os.write(2, f"\nerror: rank {_rank} stops because {lost} has ended\n".encode())
    os._exit(1)


def rank() -> int:
    """The number of this process, from 0."""
    return _rank


def world_size() -> int:
    """The number of ranks."""
    return _world_size


def is_main_process() -> bool:
    """True for rank 0, which prints, writes files and validates; also without msrun."""
    return _rank == 0


def all_gather(value: Any = None) -> list:
    """The `value` of every rank (anything that JSON can hold) by rank.

    All ranks must call it; it waits without a time limit.
    """
    return [value] if _connection is None else _connection.all_gather(value)


def require_same(value: Any, name: str) -> None:
    """Raises UserError on all ranks if `value` differs between them, as when machines see different files."""
    for other_rank, other in enumerate(all_gather(value)):
        if other != value:
            raise UserError(
                f"{name}: rank {_rank} finds {value}, rank {other_rank} finds {other}. All ranks need the same "
                "directories."
            )


def on_main_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) on the main process. Returns None on other ranks without waiting: `all_gather` waits."""
    return function(*arguments) if is_main_process() else None


def shard(items: Any) -> Any:
    """This rank's shard of a list or range that is the same on all ranks: every world_size-th item, from item rank."""
    return items[_rank::_world_size]


def micro_batches(step: nn.Cell, batches: Iterator[tuple], count: int) -> Iterator[tuple]:
    """The inputs of the `count` calls of `step` that make one update.

    The last call averages gradients over the ranks. On the CPU its collectives wait only 30 seconds for the other
    ranks, so it starts when all ranks have compiled the step and are ready.
    """
    for index in range(count):
        inputs = tuple(map(ms.Tensor, next(batches)))
        if _world_size > 1 and index == count - 1:
            if ms.get_context("mode") == ms.GRAPH_MODE:
                step.compile(*inputs)
            all_gather()
        yield inputs


def gather_parameters(parameters: dict[str, ms.Parameter]) -> dict[str, np.ndarray]:
    """The parameters of all ranks by name, for a checkpoint: on the main process; {} on the other ranks.

    All ranks must call it. A name that several ranks have is taken from the lowest of them. Tensors are sent one by
    one, so that no device has to hold all.
    """
    found = {name: p.asnumpy() for name, p in parameters.items()} if is_main_process() else {}
    layouts = all_gather({name: (p.shape, np.dtype(ms.dtype_to_nptype(p.dtype)).str) for name, p in parameters.items()})
    known = set(layouts[0])
    for sender in range(1, _world_size):
        broadcast = ops.Broadcast(sender)
        for name in sorted(set(layouts[sender]) - known):
            shape, dtype = layouts[sender][name]
            value = parameters[name].asnumpy() if _rank == sender else np.zeros(shape, dtype)
            # Sent as int32 whatever the dtype, so that every bit arrives.
            padded = value.tobytes() + bytes(-value.nbytes % 4)
            received = broadcast((ms.Tensor(np.frombuffer(padded, np.int32)),))[0]
            if is_main_process():
                found[name] = np.frombuffer(received.asnumpy().tobytes()[: value.nbytes], dtype).reshape(shape)
        known |= set(layouts[sender])
    return found


def finish() -> None:
    """Waits for all ranks at the end of the job, and disconnects: msrun kills the other ranks when one ends."""
    all_gather()
    if _connection is not None:
        _connection.close()
