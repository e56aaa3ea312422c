"""Several workers, a device each: who one is, what all of them say, and who does what only one shall do.

A job is started by msrun. With one worker, or without msrun, everything here does nothing.
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
from mindtune.distributed.rendezvous import Line

_line: Optional[Line] = None
_worker, _count = 0, 1


def set_up(distributed: bool) -> None:
    """Joins the job that msrun started, data parallel; call it before anything is printed or written, and after the mode is set.

    Workers but the first print nothing on stdout. In msrun's scheduler, which runs the script too, it does not return.
    Raises UserError if `distributed` and msrun do not come together.
    """
    global _line, _worker, _count
    role = os.environ.get("MS_ROLE")
    if not distributed:
        if role:
            raise UserError(
                "msrun started this without --distributed: every worker would train for itself. Add --distributed."
            )
        return
    if not role:
        command = shlex.join(
            ["msrun", "--worker_num=2", "--local_worker_num=2", "--join=True", "--log_dir=workers", *sys.argv]
        )
        said = "--distributed: msrun starts the workers, and it did not start this one. For two devices:"
        raise UserError(f"{said}\n  {command}\nThe number of devices is in it twice.")
    from mindspore.communication import get_group_size, get_rank, init

    host, port, count = (
        os.environ["MS_SCHED_HOST"],
        int(os.environ["MS_SCHED_PORT"]) + 1,
        int(os.environ["MS_WORKER_NUM"]),
    )
    if role == "MS_SCHED":
        # A process of its own: the scheduler's init() returns at the job's end and lets no Python run until then.
        subprocess.Popen([sys.executable, str(Path(__file__).with_name("rendezvous.py")), host, str(port), str(count)])
        init()
        sys.exit(0)
    init()
    _worker, _count = get_rank(), get_group_size()
    ms.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True)
    try:
        _line = Line(host, port, _worker, _end)
    except OSError as error:
        raise UserError(
            f"{host}:{port}, the port after msrun's --master_port, where workers meet: {error}. Give another port."
        ) from None
    print(
        f"{_count} workers; the first is process {os.getpid()}, which kill -TERM makes stop with a checkpoint (Ctrl-C makes without)"
    )
    if _worker:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)


def _end(who: str) -> None:
    os.write(2, f"\nerror: worker {_worker} stops, for {who} is gone\n".encode())
    os._exit(1)


def rank() -> int:
    """This worker's number, from 0."""
    return _worker


def world_size() -> int:
    """How many there are."""
    return _count


def is_main_process() -> bool:
    """True for the one that prints, writes and draws; for a lone one too."""
    return _worker == 0


def all_gather(value: Any = None) -> list:
    """Everybody's `value` (what JSON can hold) in the workers' order. All must call it; they wait for the last as long as it takes."""
    return [value] if _line is None else _line.gather(value)


def require_same(value: Any, what: str) -> None:
    """Raises UserError on all workers if they do not have the same `value`: their machines see different files."""
    for number, other in enumerate(all_gather(value)):
        if other != value:
            raise UserError(
                f"{what}: worker {_worker} finds {value}, worker {number} {other}. All workers need the same directories."
            )


def on_main_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) on the first worker; the others go on, with None. Whoever needs its effects must `gather` first."""
    return function(*arguments) if is_main_process() else None


def shard(items: Any) -> Any:
    """This worker's share of a list or range that all have alike: every W-th, from its own number."""
    return items[_worker::_count]


def micro_batches(step: nn.Cell, batches: Iterator[tuple], count: int) -> Iterator[tuple]:
    """The inputs of the `count` calls of `step` that make an update.

    The last call exchanges gradients, for which the CPU's collectives wait 30 seconds: it comes when all have compiled and arrived.
    """
    for number in range(count):
        inputs = tuple(map(ms.Tensor, next(batches)))
        if _count > 1 and number == count - 1:
            if ms.get_context("mode") == ms.GRAPH_MODE:
                step.compile(*inputs)
            all_gather()
        yield inputs


def collect(parameters: dict[str, ms.Parameter]) -> dict[str, np.ndarray]:
    """On the first worker the values of everybody's parameters by name, for a checkpoint; {} on the others. All must call it.

    What the first worker has of its own is not sent; the rest comes tensor by tensor, so that no device has to hold it all.
    """
    found = {name: p.asnumpy() for name, p in parameters.items()} if is_main_process() else {}
    held = all_gather({name: (p.shape, np.dtype(ms.dtype_to_nptype(p.dtype)).str) for name, p in parameters.items()})
    known = set(held[0])
    for number in range(1, _count):
        send = ops.Broadcast(number)
        for name in sorted(set(held[number]) - known):
            shape, kind = held[number][name]
            value = parameters[name].asnumpy() if _worker == number else np.zeros(shape, kind)
            # As int32 whatever it is, bit for bit.
            packed = value.tobytes() + bytes(-value.nbytes % 4)
            sent = send((ms.Tensor(np.frombuffer(packed, np.int32)),))[0]
            if is_main_process():
                found[name] = np.frombuffer(sent.asnumpy().tobytes()[: value.nbytes], kind).reshape(shape)
        known |= set(held[number])
    return found


def finish() -> None:
    """At the job's end: waits for all, for msrun kills the others when one ends, and says goodbye."""
    all_gather()
    if _line is not None:
        _line.close()
