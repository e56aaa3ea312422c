"""Training scripts in processes of their own that are killed, and what must be equal after they have been resumed."""

import os
import signal
import subprocess
import tempfile
import time

from conftest import command

from mindtune.run.checkpoint import checkpoints


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


def kill_somewhere(script, arguments, chance, after):
    """Starts a run and kills it up to a second after `after()` is true: in a step, a checkpoint, or a line of a log."""
    with tempfile.TemporaryFile("w") as log:
        process = start(script, arguments, log)
        while not after() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()


def last_state(out, *names):
    """The bytes of the files `names` in an output directory, and of every file of its last checkpoint."""
    last = checkpoints(out)[-1]
    files = [*(out / name for name in names), *(path for path in last.rglob("*") if path.is_file())]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
