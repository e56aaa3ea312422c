"""Training jobs under msrun for tests, and a comparison of two runs."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mindtune.run.checkpoint import checkpoints, damage

ROOT = Path(__file__).resolve().parents[1]
MSRUN = ROOT / "tests" / "programs" / "msrun"
# Our msrun first, then this Python, which it starts.
PATH = os.pathsep.join([str(MSRUN.parent), str(Path(sys.executable).parent), os.environ["PATH"]])


def free_port():
    """A free port whose next port is free, too: the ranks need both."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


class Job:
    """A training script under msrun, or a launch script with variables `names`; its output is beside `out`."""

    def __init__(self, script, workers, out, arguments, **names):
        self.out = Path(out)
        port = free_port()
        environment = {**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT)}
        environment.update(PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
        if str(script).endswith(".sh"):
            environment.update(names, DEVICES=str(workers), BIND="False", PORT=str(port), OUT=str(out))
            line = [ROOT / script, *map(str, arguments)]
        else:
            line = [MSRUN, f"--worker_num={workers}", f"--local_worker_num={workers}", "--join=True"]
            line += [f"--master_port={port}", f"--log_dir={out}.{port}.workers"]
            line += [str(ROOT / script), *map(str, arguments), "--distributed"]
        self.console = open(f"{out}.{port}.console", "w")  # noqa: SIM115  (closed by wait)
        self.process = subprocess.Popen(
            line, stdout=self.console, stderr=subprocess.STDOUT, env=environment, cwd=self.out.parent
        )

    def wait(self, timeout=180):
        """The exit code of msrun."""
        try:
            return self.process.wait(timeout)
        finally:
            self.console.close()

    def said(self):
        """The output of msrun and of its ranks."""
        return Path(self.console.name).read_text()

    def processes(self):
        """Process id -> environment of all processes of the job, found by command line or working directory."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                named = str(self.out) in (folder / "cmdline").read_text()
                if named or os.readlink(folder / "cwd") == str(self.out.parent):
                    environment = (folder / "environ").read_text().split("\0")
                    found[int(folder.name)] = dict(part.split("=", 1) for part in environment if "=" in part)
            except OSError:
                pass  # the process has ended, or belongs to another user
        return found

    def kill(self):
        """Kills what is left of the job."""
        for pid in self.processes():
            os.kill(pid, 9)

    def worker(self, number):
        """The process id of a rank."""
        return next(
            pid
            for pid, environment in self.processes().items()
            if environment.get("MS_ROLE") == "MS_WORKER" and environment.get("MS_NODE_ID") == str(number)
        )

    def wait_for(self, condition, timeout=120):
        """Waits until `condition()` holds; fails if the job ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()[-6000:]
            time.sleep(0.02)


def relative(value, right):
    """Euclidean distance of two arrays relative to the norm of the second."""
    value = value.astype(np.float64)
    right = right.astype(np.float64)
    return np.linalg.norm(value - right) / max(np.linalg.norm(right), 1e-300)


def assert_same_run(found, expected, updates):
    """Asserts that the last checkpoints agree within 1e-5 per tensor, relative to its norm, and that the logs agree."""
    one, other = (checkpoints(folder)[-1] for folder in (found, expected))
    assert one.name == other.name == f"checkpoint-{updates}" and damage(one) is None
    files = sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(one) for path in one.rglob("*.safetensors")) and len(files) == 2
    for name in files:
        values = load_file(one / name)
        right = load_file(other / name)
        assert {key: value.dtype for key, value in values.items()} == {key: value.dtype for key, value in right.items()}
        far = {key: relative(values[key], right[key]) for key in right if not relative(values[key], right[key]) < 1e-5}
        assert far == {}
    lines, right = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (found, expected)
    )
    assert [sorted(line) for line in lines] == [sorted(line) for line in right]
    for line, other_line in zip(lines, right):
        np.testing.assert_allclose(
            [line[name] for name in sorted(line)], [other_line[name] for name in sorted(line)], rtol=1e-5
        )
