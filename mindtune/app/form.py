"""What the buttons of the form do, and what it shows. `page` has its layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import gradio as gr
from PIL import Image

from mindtune.app import data
from mindtune.app.folders import Folders, list_folders
from mindtune.app.run import Command, Run, make_command, memory_plan, read_metrics, read_tail
from mindtune.cli import UserError
from mindtune.flags.parser import Parser
from mindtune.run import report, report_images

# Flags with a field of their own, of those that the script has. All others go into the field of more flags.
TEXTS = ("instance_prompt", "validation_prompt", "validation_image")
VALUES = (
    *("resolution", "train_batch_size", "max_train_steps", "learning_rate", "mixed_precision", "lora_rank"),
    *("checkpointing_steps", "validation_epochs", "validation_steps", "seed"),
)
SWITCHES = ("cache_latents", "gradient_checkpointing", "use_8bit_adam")
FIELDS = (*TEXTS, *VALUES, *SWITCHES)
DATA_FLAGS = ("instance_data_dir", "train_data_dir")
LINES = 10  # of a log on the page
IMAGES = 12  # on the page; the report of a run has all of them
WIDTH = 1280  # of a validation image on the page, in pixels


def flag_of(parser: Parser, name: str) -> Any:
    """argparse's declaration of a flag, or None if the script does not have it."""
    return next((action for action in parser._actions if action.dest == name), None)


class Form:
    """What the buttons do. `inputs` are the script's name, data, model, output, more flags and the values of FIELDS."""

    def __init__(self, folders: Folders, run: Run, scripts: dict[str, tuple[Path, Parser]]) -> None:
        self.folders = folders
        self.run = run
        self.scripts = scripts
        self.last: Sequence[Any] = ()  # inputs of the last run

    def command(self, inputs: Sequence[Any], resume: bool = False) -> Command:
        """The command line of the inputs. Raises UserError."""
        name, data_dir, model, output, more, *values = inputs
        path, parser = self.scripts[name]
        fields = {name: value for name, value in zip(FIELDS, values) if name in parser.declared}
        (data_flag,) = (name for name in DATA_FLAGS if name in parser.declared)
        fields.update({data_flag: data_dir, "pretrained_model_name_or_path": model, "output_dir": output})
        return make_command(path, parser, self.folders, fields, more or "", resume)

    def show_command(self, *inputs: Any) -> str:
        try:
            return str(self.command(inputs))
        except UserError as error:
            return f"not complete: {error}"

    def check_data(self, *inputs: Any) -> tuple:
        command = self.command(inputs)
        self.folders.check_links(command.values)
        task = data.task_of(command.words[0], command.values)
        return gr.Tabs(selected="data"), *data.check(command.values, task=task)

    def plan(self, *inputs: Any) -> tuple:
        command = self.command(inputs)
        self.folders.check_links(command.values)
        return gr.Tabs(selected="memory"), memory_plan(command)

    def start(self, *inputs: Any, resume: bool = False) -> tuple:
        command = self.command(inputs, resume)
        self.folders.check_links(command.values)
        self.run.start(command, self.log_of(command.output_dir))
        self.last = inputs
        return gr.Tabs(selected="training"), str(command)

    def resume(self, *inputs: Any) -> tuple:
        return self.start(*inputs, resume=True)

    def log_of(self, output_dir: Path) -> Path:
        return self.folders.path("output_dir", f"{output_dir}.log", ("outputs",))

    # ---- what is shown ---------------------------------------------------------------------------

    def open_page(self) -> list:
        """Updates of all inputs: what the folders hold, and the inputs of the last run."""
        name, *values = self.last or (next(iter(self.scripts)), *[None] * (4 + len(FIELDS)))
        data_sets = list_folders(self.folders.data, has=bool, depth=3)
        models = list_folders(self.folders.models, has=lambda files: "model_index.json" in files, depth=2)
        chosen = [
            gr.update(value=name),
            gr.update(choices=data_sets, value=values[0]),
            gr.update(choices=models, value=values[1] or (models[0] if len(models) == 1 else None)),
            gr.update(value=values[2]),
            gr.update(value=values[3]),
        ]
        return chosen + self.describe_fields(name, *values[4:])

    def describe_fields(self, name: str, *values: Any) -> list:
        """Updates of FIELDS, which have these values, for a script: with the help and defaults of its parser."""
        return [describe(flag_of(self.scripts[name][1], field), value) for field, value in zip(FIELDS, values)]

    def view(self, output: str) -> View:
        """What to show: of the run while it is going on, otherwise of the output directory in the form."""
        command, running, status = self.run.command, self.run.is_running(), self.run.status()
        if command and (running or not output):
            output = str(command.output_dir)
        if not output:
            return View(running, status)
        try:
            out = self.inside(Path(output))
            metrics = self.inside(out / "metrics.jsonl")
            size = metrics.stat().st_size if metrics.is_file() else 0
            newest = report_images.newest_rows(out)[:IMAGES] + report_images.validation_images(out)[: -IMAGES - 1 : -1]
            images = [(self.inside(path), when) for path, when in newest]
            log = "\n".join(read_tail(self.log_of(out)).splitlines()[-LINES:])
            return View(running, status, log, (out, size), images)
        except UserError as error:
            return View(running, f"error: {error}")

    def inside(self, path: Path) -> Path:
        """A path without links. Raises UserError if it is not in --outputs."""
        return self.folders.path("output_dir", str(path), ("outputs",))

    def follow(self, output: str, seen: Optional[View]) -> list:
        """Updates of status, log, plots, images, Start, Resume and Stop where they differ from `seen`; the new view."""
        new = self.view(output)
        changed = {name for name in View._fields if seen is None or getattr(new, name) != getattr(seen, name)}
        idle, busy = gr.update(interactive=not new.running), gr.update(interactive=new.running)
        return [
            new.status if "status" in changed else gr.skip(),
            new.log if "log" in changed else gr.skip(),
            plots(*new.metrics) if "metrics" in changed else gr.skip(),
            [(load(path), when) for path, when in new.images] if "images" in changed else gr.skip(),
            *([idle, idle, busy] if "running" in changed else [gr.skip()] * 3),
            new,
        ]


class View(NamedTuple):
    """What the page shows of a run: `metrics` are its directory and the size of metrics.jsonl, in bytes."""

    running: bool
    status: str
    log: str = ""
    metrics: tuple[Optional[Path], int] = (None, 0)
    images: Sequence[tuple[Path, str]] = ()


def plots(out: Optional[Path], size: int) -> str:
    """The curves of a run as HTML, drawn as in its report; "" without metrics."""
    metrics = read_metrics(out / "metrics.jsonl") if out and size else []
    return f'<div class="plots">{"".join(report.curves(out, metrics))}</div>' if out and metrics else ""


def load(path: Path) -> Image.Image:
    """A validation image, at most `WIDTH` pixels wide."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((WIDTH, 10 * WIDTH))
    return image


def describe(action: Any, value: Any) -> Any:
    """The update of a flag's field: hidden without the flag; otherwise with its help and default."""
    if action is None:
        return gr.update(visible=False, value=None)
    text = action.help % {"default": action.default} + (" One on each line." if action.nargs == "+" else "")
    if action.nargs == 0:
        return gr.update(visible=True, info=text, value=bool(value))
    if action.choices:
        return gr.update(visible=True, info=text, choices=list(action.choices), value=value or action.default)
    default = "" if action.default in (None, []) else str(action.default)
    return gr.update(visible=True, info=text, placeholder=default, value=value or "")
