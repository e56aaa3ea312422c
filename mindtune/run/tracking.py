"""Records of a run: metrics.jsonl, tracking services, run.json, and the held-out loss by timestep as table and plot."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import platform
import resource
import secrets
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from mindtune.cli import UserError
from mindtune.files import write_atomically

PACKAGES = ("mindtune", "mindspore", "mindone", "transformers", "numpy", "safetensors", "datasets")


def services(report_to: str) -> tuple[str, ...]:
    """The services that --report_to names. all: TensorBoard, and W&B and SwanLab if they are installed and logged in.

    Raises UserError if the named service is not installed, or neither logged in nor offline by its environment
    variable.
    """
    if report_to in ("none", "tensorboard"):
        return () if report_to == "none" else ("tensorboard",)
    online = ("wandb", "swanlab")
    if report_to == "all":
        problems = {name: _problem(name) for name in online}
        for name, problem in problems.items():
            if problem:
                print(f"--report_to all: without {name}: {problem}")
        return "tensorboard", *(name for name in online if not problems[name])
    if problem := _problem(report_to):
        raise UserError(f"--report_to {report_to}: {problem}.")
    return (report_to,)


def _problem(name: str) -> Optional[str]:
    """Why W&B or SwanLab cannot be used, with what to do, or None."""
    if importlib.util.find_spec(name) is None:
        return f"the package {name} is not installed; pip install {name}"
    mode = f"{name.upper()}_MODE"
    if os.environ.get(mode) in ("offline", "disabled", "local"):
        return None
    package = importlib.import_module(name)
    logged_in = package.login(prompt=False) if name == "wandb" else package.Settings().api_key
    return None if logged_in else f"nobody is logged in; run `{name} login`, or set {mode}=offline"


class Tracker:
    """Writes scalars to output_dir/metrics.jsonl, and scalars and images to tracking services.

    The services keep their files in `logging_dir`. After resuming at update `resumed`, lines of later updates are
    removed from metrics.jsonl and TensorBoard, and W&B and SwanLab continue the same run. `flags` are stored as the
    run's config there.
    """

    def __init__(
        self, output_dir: Path, logging_dir: Path, services: Iterable[str], resumed: int, flags: Optional[dict] = None
    ) -> None:
        self.path = output_dir / "metrics.jsonl"
        kept = [line for line in _complete_lines(self.path) if json.loads(line)["step"] <= resumed] if resumed else []
        write_atomically(self.path, lambda path: path.write_text("".join(f"{line}\n" for line in kept)))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  (closed by close)
        self.writer = self.wandb = self.swanlab = None
        if "tensorboard" in services:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(logging_dir), purge_step=resumed + 1 if resumed else None)
        name = output_dir.resolve().name
        run = {"project": "mindtune", "config": flags, "resume": "allow"}
        if {"wandb", "swanlab"} & set(services):
            run["id"] = _run_id(logging_dir, resumed)
        if "wandb" in services:
            import wandb

            settings = wandb.Settings(silent=True, console="off")
            self.wandb = wandb.init(name=name, dir=str(logging_dir), settings=settings, **run)
            # W&B's own step count may not decrease, but the step of a resumed run does.
            self.wandb.define_metric("*", step_metric="update")
        if "swanlab" in services:
            import swanlab

            swanlab.init(experiment_name=name, logdir=str(logging_dir / "swanlab"), **run)
            self.swanlab = swanlab

    def log(self, step: int, **values: float) -> None:
        """Logs the scalars of update `step`: one line in metrics.jsonl; in the services, `a__b` is named a/b."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        scalars = {name.replace("__", "/"): value for name, value in values.items()}
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({"update": step, **scalars})
        if self.swanlab:
            self.swanlab.log(scalars, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Sends an image of update `step` to the services."""
        pixels = np.asarray(image)
        if self.writer:
            self.writer.add_image(name, pixels, step, dataformats="HWC")
            self.writer.flush()
        if self.wandb:
            import wandb

            self.wandb.log({"update": step, name: wandb.Image(pixels)})
        if self.swanlab:
            self.swanlab.log({name: self.swanlab.Image(pixels)}, step=step)

    def flush(self) -> None:
        """Hands everything logged so far to the operating system; called before a checkpoint is complete."""
        self.file.flush()
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()
        if self.swanlab:
            self.swanlab.finish()


def _run_id(logging_dir: Path, resumed: int) -> str:
    """The run's id in W&B and SwanLab: random for a new run, the stored one for a resumed run."""
    path = logging_dir / "run_id.txt"
    if not (resumed and path.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text()


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file without its last one if that was torn by a kill; [] if the file does not exist."""
    if not path.is_file():
        return []
    return [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def peak_memory_mb() -> dict[str, int]:
    """Peak resident memory in MB of this process and of its largest child, the encoder stage."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    processes = {"training_process": resource.RUSAGE_SELF, "encode_process": resource.RUSAGE_CHILDREN}
    peaks = {name: resource.getrusage(process).ru_maxrss // unit for name, process in processes.items()}
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss includes the memory of the process that started this one
        peaks["training_process"] = int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024
    return peaks


def package_versions() -> dict[str, Optional[str]]:
    """Versions of Python and of PACKAGES; None for a package that is not installed."""
    found: dict[str, Optional[str]] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_run_json(path: Path, **content: object) -> None:
    """Writes `content` as JSON; values that JSON does not know become strings."""
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=1, default=str) + "\n"))


class LossByTimestep:
    """Held-out loss by timestep over a run: loss_by_timestep.csv with the columns step, `place` and loss, and its plot.

    `place` names the position of a timestep between 0 (image) and 1 (noise): sigma, or timestep for the timestep's
    fraction.
    """

    def __init__(self, output_dir: Path, resumed: int, place: str = "sigma") -> None:
        self.path, self.place = output_dir / "loss_by_timestep.csv", place
        self.rows: list[tuple[int, float, float]] = []
        if resumed and self.path.is_file():
            rows = [row for row in csv.reader(_complete_lines(self.path)[1:]) if len(row) == 3]
            self.rows = [(int(step), float(at), float(loss)) for step, at, loss in rows if int(step) <= resumed]

    def has(self, step: int) -> bool:
        """Whether the loss after update `step` is in the table."""
        return any(row[0] == step for row in self.rows)

    def add(self, step: int, places: list[float], losses: list[float]) -> None:
        """Adds the losses at `places` after update `step`, and writes the table."""
        self.rows += [(step, place, loss) for place, loss in zip(places, losses)]
        text = f"step,{self.place},loss\n" + "".join(f"{step},{place!r},{loss!r}\n" for step, place, loss in self.rows)
        write_atomically(self.path, lambda beside: beside.write_text(text))

    def plot(self) -> Optional[Path]:
        """Plots the losses after the first, the last and up to four updates between.

        Returns the PNG's path, None without rows.
        """
        if not self.rows:
            return None
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        steps = sorted({row[0] for row in self.rows})
        shown = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, 6)})
        for index, step in enumerate(shown):
            points = sorted((place, loss) for row_step, place, loss in self.rows if row_step == step)
            shade = 0.85 - 0.85 * index / max(1, len(shown) - 1)
            color = (shade, shade * 0.9, 0.9)
            axes.plot(*zip(*points), marker="o", markersize=3, color=color, label=f"after {step} updates")
        axes.set(
            title="Held-out loss by timestep",
            xlabel=f"{self.place} (0 image, 1 noise)",
            ylabel="loss on held-out images",
        )
        axes.legend(fontsize=8)
        path = self.path.with_suffix(".png")
        write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=110))
        return path
