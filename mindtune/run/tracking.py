"""What a run leaves for its people: metrics.jsonl, TensorBoard, run.json, the loss by timestep as table and plot."""

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
    """What --report_to names, as names of services. all: TensorBoard, and those of W&B and SwanLab that are installed and logged in.

    Raises UserError if the one that is named is not installed, or nobody is logged in and it is not told to stay offline.
    """
    if report_to in ("none", "tensorboard"):
        return () if report_to == "none" else ("tensorboard",)
    others = ("wandb", "swanlab")
    if report_to == "all":
        problems = {name: _problem(name) for name in others}
        for name, problem in problems.items():
            if problem:
                print(f"--report_to all: without {name}: {problem}")
        return "tensorboard", *(name for name in others if not problems[name])
    if problem := _problem(report_to):
        raise UserError(f"--report_to {report_to}: {problem}.")
    return (report_to,)


def _problem(name: str) -> Optional[str]:
    """Why nothing can be sent to W&B or SwanLab, with what to do, or None."""
    if importlib.util.find_spec(name) is None:
        return f"the package {name} is not installed; pip install {name}"
    mode = f"{name.upper()}_MODE"
    if os.environ.get(mode) in ("offline", "disabled", "local"):
        return None
    package = importlib.import_module(name)
    known = package.login(prompt=False) if name == "wandb" else package.Settings().api_key
    return None if known else f"nobody is logged in; run `{name} login`, or set {mode}=offline"


class Tracker:
    """Writes scalars to output_dir/metrics.jsonl, and scalars and pictures to each of `services`, whose own files are in `logging_dir`.

    After a resume at update `resumed`, what was logged of later updates is dropped from metrics.jsonl and TensorBoard, and W&B and SwanLab
    go on with the same run. `flags` are shown beside the curves there.
    """

    def __init__(
        self, output_dir: Path, logging_dir: Path, services: Iterable[str], resumed: int, flags: Optional[dict] = None
    ) -> None:
        self.path = output_dir / "metrics.jsonl"
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= resumed] if resumed else []
        write_atomically(self.path, lambda path: path.write_text("".join(f"{line}\n" for line in kept)))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  (closed by close)
        self.writer = self.wandb = self.swanlab = None
        if "tensorboard" in services:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(logging_dir), purge_step=resumed + 1 if resumed else None)
        name = output_dir.resolve().name
        same = {"project": "mindtune", "config": flags, "resume": "allow"}
        if {"wandb", "swanlab"} & set(services):
            same["id"] = _run_id(logging_dir, resumed)
        if "wandb" in services:
            import wandb

            settings = wandb.Settings(silent=True, console="off")
            self.wandb = wandb.init(name=name, dir=str(logging_dir), settings=settings, **same)
            self.wandb.define_metric(
                "*", step_metric="update"
            )  # W&B's own steps may not go back, as a resumed run does
        if "swanlab" in services:
            import swanlab

            swanlab.init(experiment_name=name, logdir=str(logging_dir / "swanlab"), **same)
            self.swanlab = swanlab

    def log(self, step: int, **values: float) -> None:
        """One line for update `step`; in the services one scalar a name, where `a__b` becomes a/b."""
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
        """Before a checkpoint is named, everything up to it is on its way to disk."""
        self.file.flush()
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        self.file.close()
        for open_one in (
            self.writer and self.writer.close,
            self.wandb and self.wandb.finish,
            self.swanlab and self.swanlab.finish,
        ):
            if open_one:
                open_one()


def _run_id(logging_dir: Path, resumed: int) -> str:
    """The id under which W&B and SwanLab know a run: drawn for a new one, that of before for a resumed one."""
    path = logging_dir / "run_id.txt"
    if not (resumed and path.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that a kill may have torn at its end."""
    return (
        [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.is_file()
        else []
    )


def peak_memory_mb() -> dict[str, int]:
    """Peak resident memory in MB of this process and of the largest child (the encode stage)."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    who = {"training_process": resource.RUSAGE_SELF, "encode_process": resource.RUSAGE_CHILDREN}
    peaks = {name: resource.getrusage(which).ru_maxrss // unit for name, which in who.items()}
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss begins at what the process that started this one had
        peaks["training_process"] = int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024
    return peaks


def package_versions() -> dict[str, Optional[str]]:
    found: dict[str, Optional[str]] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_run_json(path: Path, **content: object) -> None:
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=1, default=str) + "\n"))


class LossByTimestep:
    """Held-out loss over time: a table step, `place`, loss in `loss_by_timestep.csv`, and its plot.

    `place` is what tells timesteps apart, from 0 (image) to 1 (noise): sigma, or the share of the timesteps.
    """

    def __init__(self, output_dir: Path, resumed: int, place: str = "sigma") -> None:
        self.path, self.place = output_dir / "loss_by_timestep.csv", place
        self.rows: list[tuple[int, float, float]] = []
        if resumed and self.path.is_file():
            rows = [row for row in csv.reader(_whole_lines(self.path)[1:]) if len(row) == 3]
            self.rows = [(int(a), float(b), float(c)) for a, b, c in rows if int(a) <= resumed]

    def has(self, step: int) -> bool:
        return any(row[0] == step for row in self.rows)

    def add(self, step: int, places: list[float], losses: list[float]) -> None:
        self.rows += [(step, place, loss) for place, loss in zip(places, losses)]
        text = f"step,{self.place},loss\n" + "".join(f"{step},{place!r},{loss!r}\n" for step, place, loss in self.rows)
        write_atomically(self.path, lambda beside: beside.write_text(text))

    def plot(self) -> Optional[Path]:
        """First, last and up to four steps between, one line each."""
        if not self.rows:
            return None
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        steps = sorted({row[0] for row in self.rows})
        shown = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, 6)})
        for number, step in enumerate(shown):
            points = sorted((sigma, loss) for s, sigma, loss in self.rows if s == step)
            shade = 0.85 - 0.85 * number / max(1, len(shown) - 1)
            axes.plot(
                *zip(*points), marker="o", markersize=3, color=(shade, shade * 0.9, 0.9), label=f"after {step} updates"
            )
        axes.set(
            xlabel=f"{self.place} (0 image, 1 noise)",
            ylabel="loss on held-out images",
            title="Held-out loss by timestep",
        )
        axes.legend(fontsize=8)
        path = self.path.with_suffix(".png")
        write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=110))
        return path
