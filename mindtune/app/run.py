"""The run of the form: its command line, its process, and what it has written so far."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mindtune.app.folders import Folders
from mindtune.cli import UserError
from mindtune.flags.parser import Parser
from mindtune.flags.script_parser import command_words, read_values

REPOSITORY = Path(__file__).resolve().parents[2]
TAIL = 1 << 16  # bytes of a log that are read

# ---- the command line ----------------------------------------------------------------------------


class Command(NamedTuple):
    """A training script with its flags: the words after `python`, and the value of every flag."""

    words: list[str]
    values: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"])

    def __str__(self) -> str:
        return shlex.join(["python", *self.words])


def make_command(
    script: Path, parser: Parser, folders: Folders, fields: dict[str, Any], more: str, resume: bool = False
) -> Command:
    """The command line of a script from the fields of the form, by the names of flags, and the field of more flags.

    A field that is empty or False keeps the flag's default; of a flag that takes several values, each is on a line of
    its own. Raises UserError for what the parser refuses, and for paths outside of `folders`.
    """
    lists, single = [], []
    for name, value in fields.items():
        (action,) = (action for action in parser._actions if action.dest == name)
        if value in (None, "", False):
            continue
        if action.nargs == 0:
            single.append(f"--{name}")
        elif action.nargs == "+":
            lists += [f"--{name}", *(line.strip() for line in value.splitlines() if line.strip())]
        else:
            single.append(f"--{name}={value}")
    try:
        more_words = shlex.split(more)
    except ValueError as error:
        raise UserError(f"more flags: {error}. Put text with spaces in quotes.") from None
    # A list must not come last: it would take the first words of `more`.
    words = [*lists, *single, *more_words] + ["--resume_from_checkpoint=latest"] * resume
    values = folders.guarded(parser, read_values(parser, words))
    if Path(values["output_dir"]) == folders.outputs.resolve():
        raise UserError(f"--output_dir: name a folder in --outputs {folders.outputs}, one for each run.")
    if values["dry_run"]:
        raise UserError("--dry_run: leave it out; the form has a button for the memory plan.")
    return Command([str(script), *command_words(parser, values)], values)


def environment() -> dict[str, str]:
    """Environment variables of a script: it imports the package that this process has imported, from any directory."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def memory_plan(command: Command) -> str:
    """What the script prints with --dry_run. Raises UserError with its error."""
    line = [sys.executable, *command.words, "--dry_run"]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment()
    )
    if done.returncode:
        raise UserError(last_error(done.stderr))
    return done.stdout.rstrip()


# ---- the process ---------------------------------------------------------------------------------


class Run:
    """The process of a run, at most one at a time. Its output goes to a log beside the output directory.

    The process has a session of its own: neither the end of this process nor Ctrl-C in its terminal ends it.
    """

    def __init__(self) -> None:
        self.process: Optional[subprocess.Popen] = None
        self.command: Optional[Command] = None
        self.log: Optional[Path] = None
        self.log_start = 0  # bytes of the log before this run
        self.is_stopping = False
        self.lock = threading.Lock()

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, command: Command, log: Path) -> None:
        """Starts a command line. Raises UserError if a run is going on, of this form or in the same directory."""
        with self.lock:
            if self.command and self.is_running():
                raise UserError(f"a run is going on in {self.command.output_dir}. Stop it, or wait for its end.")
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
                try:  # the process inherits the lock, and keeps it if this one is killed
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{log}: another run still writes here. Wait for its end.") from None
                print(f"$ {command}", file=file, flush=True)
                self.log_start = file.tell()
                self.process = subprocess.Popen(
                    [sys.executable, *command.words],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=log.parent,  # MindSpore writes files of its own there
                    start_new_session=True,
                    env=environment(),
                )
            self.command, self.log, self.is_stopping = command, log, False
            self.started = time.strftime("%H:%M")

    def stop(self) -> None:
        """Sends SIGINT once, as Ctrl-C does: after a second one the script would stop without a checkpoint."""
        with self.lock:
            if self.process and self.is_running() and not self.is_stopping:
                self.is_stopping = True
                self.process.send_signal(signal.SIGINT)

    def status(self) -> str:
        """What the run does or how it ended; with its error, if there was one."""
        if self.process is None or self.command is None:
            return "nothing started yet"
        code, where = self.process.poll(), self.command.output_dir
        if code is None:
            doing = "stopping after this update" if self.is_stopping else "running"
            return f"{doing}, since {self.started}: {where}"
        if code == 0:
            return f"finished: {where}"
        text = read_tail(self.log, self.log_start) if self.log else ""
        if code == -signal.SIGINT:  # before the script handles it, or a second one
            return "stopped without a checkpoint"
        if code == 130:
            return f"stopped: {text.splitlines()[-1]}"
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"failed with {reason}\n{last_error(text)}"


# ---- what it has written -------------------------------------------------------------------------


def read_tail(path: Path, start: int = 0) -> str:
    """The last lines of a log from byte `start` on, of a progress bar only its last state; "" if there is no file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - TAIL))
        text = file.read().decode("utf-8", "replace")
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def last_error(text: str, limit: int = 20) -> str:
    """The last line of `text` that starts with "error: " with those after it, or else the last `limit` lines."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-limit:])


def read_metrics(path: Path) -> Sequence[dict]:
    """The lines of metrics.jsonl, without one that is being written; none if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
