"""The page of the form: its fields, buttons and views, in Gradio, and the server on this machine."""

from __future__ import annotations

import html
import warnings
from pathlib import Path
from typing import Any, Callable

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mindtune.app.folders import Folders
from mindtune.app.form import SWITCHES, TEXTS, VALUES, Form, flag_of
from mindtune.app.run import Run
from mindtune.cli import UserError
from mindtune.flags.parser import Parser

SECONDS = 4  # between looks at the files of a run
STYLE = """
.mono textarea { font-family: ui-monospace, monospace; font-size: 12px; }
.fields .form { background: var(--block-background-fill); display: grid; }
.fields .form { grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
#problem pre { border-left: 4px solid #dc2626; font-size: 12px; padding: 6px 10px; white-space: pre-wrap; }
.plots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); }
.plots svg { height: auto; width: 100%; }
"""


def make_field(name: str, scripts: dict[str, tuple[Path, Parser]]) -> Any:
    """The component of a flag. `describe` fills it for a script."""
    action = next(filter(None, (flag_of(parser, name) for _, parser in scripts.values())))
    settings: dict[str, Any] = {"label": f"--{name}", "elem_id": name}
    if action.nargs == 0:
        return gr.Checkbox(**settings)
    if action.choices:
        return gr.Dropdown(list(action.choices), **settings)
    return gr.Textbox(lines=2 if action.nargs == "+" else 1, **settings)


def build(folders: Folders, run: Run, scripts: dict[str, tuple[Path, Parser]]) -> gr.Blocks:
    """The page. `scripts` are (path, parser) of the training scripts by their names."""
    form = Form(folders, run, scripts)
    mono: dict[str, Any] = {"elem_classes": "mono", "interactive": False}
    button: dict[str, Any] = {"size": "md", "min_width": 90}
    with gr.Blocks(title="MindTune", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# MindTune")
        with gr.Row():
            with gr.Column(scale=5):
                script = gr.Dropdown(list(scripts), label="Training script", elem_id="script")
                with gr.Row():
                    data_dir = gr.Dropdown(
                        [], label=f"Data set, in {folders.data}", allow_custom_value=True, elem_id="data"
                    )
                    model = gr.Dropdown(
                        [], label=f"Base model, in {folders.models}", allow_custom_value=True, elem_id="model"
                    )
                output = gr.Textbox(
                    label=f"Output directory, in {folders.outputs}", placeholder="my-run", elem_id="output"
                )
                fields = [make_field(name, scripts) for name in TEXTS]
                with gr.Row(elem_classes="fields"):
                    fields += [make_field(name, scripts) for name in VALUES]
                with gr.Group():
                    fields += [make_field(name, scripts) for name in SWITCHES]
                more = gr.Textbox(
                    label="More flags",
                    info="As on a command line. Paths must be in the directories of the form.",
                    placeholder="--lr_scheduler cosine --lr_warmup_steps 20",
                    lines=2,
                    elem_id="more",
                )
            with gr.Column(scale=6):
                command = gr.Textbox(label="Command", lines=3, max_lines=8, buttons=["copy"], elem_id="command", **mono)
                with gr.Row():
                    check_button = gr.Button("Check data", **button)
                    plan_button = gr.Button("Plan memory", **button)
                    start_button = gr.Button("Start", **button, variant="primary")
                    stop_button = gr.Button("Stop", **button, variant="stop", interactive=False)
                    resume_button = gr.Button("Resume", **button)
                problem = gr.HTML(elem_id="problem")
                with gr.Tabs(selected="data") as tabs:
                    with gr.Tab("Data", id="data"):
                        table = gr.Textbox(label="Report", lines=6, max_lines=24, elem_id="table", **mono)
                        thumbnails = gr.Gallery(
                            label="First images",
                            columns=4,
                            object_fit="contain",
                            height=380,
                            buttons=[],
                            interactive=False,
                            elem_id="thumbnails",
                        )
                    with gr.Tab("Memory", id="memory"):
                        plan = gr.Textbox(label="Plan", lines=8, max_lines=30, elem_id="plan", **mono)
                    with gr.Tab("Training", id="training"):
                        status = gr.Textbox(label="Status", max_lines=20, elem_id="status", **mono)
                        curves = gr.HTML(elem_id="curves")
                        images = gr.Gallery(
                            label="Newest validation images",
                            columns=3,
                            object_fit="contain",
                            height=400,
                            buttons=["download"],
                            interactive=False,
                            elem_id="images",
                        )
                        log = gr.Textbox(label="Last lines of the log", lines=12, max_lines=12, elem_id="log", **mono)
        inputs = [script, data_dir, model, output, more, *fields]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

        def on_click(button: gr.Button, action: Callable[..., tuple], outputs: list) -> None:
            button.click(with_problem(action, len(outputs)), inputs, [*outputs, problem], api_visibility="private")

        on_click(check_button, form.check_data, [tabs, table, thumbnails])
        on_click(plan_button, form.plan, [tabs, plan])
        on_click(start_button, form.start, [tabs, command])
        on_click(resume_button, form.resume, [tabs, command])
        stop_button.click(run.stop, None, None, **hidden)
        # Not `change`: when `open_page` sets the script, it sets the fields too.
        script.input(form.describe_fields, [script, *fields], fields, **hidden)
        changes = [component.change for component in inputs]
        gr.on(changes, form.show_command, inputs, command, trigger_mode="always_last", **hidden)
        page.load(form.open_page, None, inputs, **hidden)
        seen = gr.State(None)
        views = [status, log, curves, images, start_button, resume_button, stop_button, seen]
        gr.Timer(SECONDS).tick(form.follow, [output, seen], views, **hidden)
    return page


def with_problem(action: Callable[..., tuple], count: int) -> Callable[..., list]:
    """`action` with one more result, the field of errors. After a UserError its `count` outputs stay as they are."""

    def call(*inputs: Any) -> list:
        try:
            return [*action(*inputs), ""]
        except UserError as error:
            return [*[gr.skip()] * count, f"<pre>{html.escape(f'error: {error}')}</pre>"]

    return call


def launch(page: gr.Blocks, port: int) -> str:
    """Serves the page on 127.0.0.1, in threads. Returns its address. Raises UserError if the port is taken."""
    warnings.filterwarnings("ignore", module="gradio")  # of its own use of other libraries, at every request
    # A page of another site whose name was made to mean 127.0.0.1 sends that name.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # not from a server
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            max_file_size=1,  # byte: nothing is uploaded
            footer_links=[],
            theme=gr.themes.Default(**fonts),
            css=STYLE,
            app_kwargs={"middleware": [hosts]},
        )
    except OSError:
        raise UserError(f"--port {port}: is in use. Name another port.") from None
    return address
