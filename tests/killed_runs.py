"""Training runs that are killed, and what must be equal after they have been resumed."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time

import pytest
from conftest import command

from mindtune.run import checkpoint, record


def start(script, arguments, log):
    """The script as a running process that writes to the file `log`. Ctrl-C works as in a terminal."""

    def take_sigint():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored

    return subprocess.Popen(
        command(script, arguments),
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=take_sigint,
    )


def wait_until(ready, process, log=None, seconds=120):
    """Waits until `ready()`. Fails if the process ends before, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log and log.read_text()
        time.sleep(0.05)


def kill_somewhere(script, arguments, after):
    """Starts a run and kills it up to a second after `after()` is true: in a step, a checkpoint, or a line of a log."""
    with tempfile.TemporaryFile("w") as log:
        process = start(script, arguments, log)
        while not after() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def killed_in_update(out, update, left):
    """A run in this process that trains in `out` meanwhile: `left` is what a kill in an update leaves of `out`.

    A kill leaves the files as they are at that moment, so a copy made then is the same, and the run goes on. The moment
    is in the middle of the update's line in metrics.jsonl.
    """
    log = record.Run.update

    def log_and_copy(self, *losses, **values):
        log(self, *losses, **values)
        if self.step == update:
            shutil.copytree(out, left)
            lines = left / "metrics.jsonl"
            lines.write_bytes(lines.read_bytes()[:-10])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record.Run, "update", log_and_copy)
        yield
    assert left.is_dir()


@contextlib.contextmanager
def killed_in_checkpoint(out, update, left):
    """As `killed_in_update`, while the training state of the checkpoint after `update` is written."""
    save_state = checkpoint.save_state

    def save_half_and_copy(path, parameters):
        save_state(path, parameters)
        if path.parent.name == f".checkpoint-{update}.partial":
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            shutil.copytree(out, left)
            path.write_bytes(whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_state", save_half_and_copy)
        yield
    assert list(left.glob(".checkpoint-*.partial"))


def last_state(out, *names):
    """The bytes of the files `names` in an output directory, and of every file of its last checkpoint."""
    last = checkpoint.checkpoints(out)[-1]
    files = [*(out / name for name in names), *(path for path in last.rglob("*") if path.is_file())]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def assert_a_killed_process_resumes(script, make_flags, run, flags, folder, names):
    """A run in a process of its own that SIGKILL ends after a checkpoint, and that is resumed, ends as one that is not.

    `make_flags(out, *flags)` is the command line, `run(out, *flags)` trains in this process, and `names` are those of
    `assert_resumes_exactly`.
    """
    flags = [*flags, "--max_train_steps", 6, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    killed, whole = folder / "killed", folder / "whole"
    kill_somewhere(script, make_flags(killed, *flags), after=lambda: checkpoint.checkpoints(killed))
    run(killed, *flags)
    run(whole, *flags)
    assert last_state(killed, *names) == last_state(whole, *names)


def assert_resumes_exactly(run, flags, folder, names, capfd, kills=2):
    """A run of six updates with checkpoints after every second that is killed ends as one that is left alone.

    `run(out, *flags)` trains in this process. Equal to the byte are the files `names`, which the last update made, and
    the last checkpoint. Of two kills, the first is in an update, perhaps before the first checkpoint; the run then
    starts over. The last is while a checkpoint is written.
    """
    flags = [*flags, "--max_train_steps", 6, "--checkpointing_steps", 2]
    outs = [folder / f"killed {count} times" for count in range(kills + 1)]
    update = random.randint(1, 5)
    print("the first of two kills is in update", update)
    moments = (killed_in_update, update), (killed_in_checkpoint, 6 if kills == 2 and update == 5 else 4)
    for out, left, (killed, number) in zip(outs, outs[1:], moments[-kills:]):
        with killed(out, number, left):
            run(out, *flags)
        flags = [*flags, "--resume_from_checkpoint", "latest"]
    capfd.readouterr()
    run(outs[-1], *flags)
    printed = capfd.readouterr().out
    assert "resuming from checkpoint-" in printed and "not its exact continuation" not in printed
    states = [last_state(out, *names) for out in outs]
    assert all(state == states[0] for state in states)
