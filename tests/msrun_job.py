"""A training job as msrun starts it, its processes, and whether two runs are the same."""

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


def free_port():
    """A port that is free together with the one after it, where the workers meet."""
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
    """A training script under msrun; its console and the workers' logs are beside the output directory."""

    def __init__(self, script, workers, out, arguments):
        self.out, port = Path(out), free_port()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # msrun starts the python that is first there
        environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        line = [
            str(Path(sys.executable).with_name("msrun")),
            f"--worker_num={workers}",
            f"--local_worker_num={workers}",
            "--join=True",
        ]
        line += [
            f"--master_port={port}",
            f"--log_dir={out}.{port}.workers",
            str(ROOT / script),
            *map(str, arguments),
            "--distributed",
        ]
        self.console = open(f"{out}.{port}.console", "w")  # noqa: SIM115  (closed by wait)
        self.process = subprocess.Popen(
            line, stdout=self.console, stderr=subprocess.STDOUT, env=environment, cwd=self.out.parent
        )

    def wait(self, timeout=180):
        """msrun's exit code."""
        try:
            return self.process.wait(timeout)
        finally:
            self.console.close()

    def said(self):
        """What msrun's console shows, the workers' words among it."""
        return Path(self.console.name).read_text()

    def processes(self):
        """Process ids of everything that belongs to the job, by command line or working directory: {id: its environment}."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.out) in (folder / "cmdline").read_text() or os.readlink(folder / "cwd") == str(
                    self.out.parent
                ):
                    environment = (folder / "environ").read_text().split("\0")
                    found[int(folder.name)] = dict(part.split("=", 1) for part in environment if "=" in part)
            except OSError:
                pass  # gone, or not ours
        return found

    def worker(self, number):
        """The process id of a worker."""
        return next(
            pid
            for pid, environment in self.processes().items()
            if environment.get("MS_ROLE") == "MS_WORKER" and environment.get("MS_NODE_ID") == str(number)
        )

    def wait_for(self, condition, timeout=120):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()[-6000:]
            time.sleep(0.02)


def relative(value, right):
    """Distance of two arrays in parts of the second's length."""
    value, right = value.astype(np.float64), right.astype(np.float64)
    return np.linalg.norm(value - right) / max(np.linalg.norm(right), 1e-300)


def assert_same_run(found, expected, updates):
    """Every tensor of weights and optimizer state in the last checkpoint within 1e-5 of its length; the same losses and norms logged."""
    one, other = (checkpoints(folder)[-1] for folder in (found, expected))
    assert one.name == other.name == f"checkpoint-{updates}" and damage(one) is None
    files = sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(one) for path in one.rglob("*.safetensors")) and len(files) == 2
    for name in files:
        values, right = load_file(one / name), load_file(other / name)
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
