"""Start and end of the form, without Gradio."""

import re
import signal

import pytest
from conftest import ROOT, TRAINING_SCRIPTS

from mindtune.app import __main__ as app
from mindtune.app.run import Command, Run
from mindtune.cli import UserError


def test_without_gradio_the_error_says_how_to_install_it(folders, monkeypatch):
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[app\]".*\n?.*Python 3\.10 or newer'):
        app.main(["--data", str(folders.data), "--models", str(folders.models), "--outputs", str(folders.outputs)])


def test_only_the_page_imports_gradio():
    importing = re.compile(r"^\s*(from|import) (gradio|starlette)", re.MULTILINE)
    found = [path for path in (ROOT / "mindtune").rglob("*.py") if importing.search(path.read_text())]
    assert sorted(str(path.relative_to(ROOT / "mindtune")) for path in found) == ["app/form.py", "app/page.py"]


@pytest.mark.parametrize("missing", ["data", "models", "outputs"])
def test_a_missing_folder_is_named(folders, missing):
    flags = {name: str(getattr(folders, name)) for name in folders._fields} | {missing: "absent"}
    with pytest.raises(UserError, match=f"--{missing} absent: is no directory"):
        app.find_folders(app.parse_args([word for name, value in flags.items() for word in (f"--{name}", value)]))


def test_relative_folders_are_made_absolute(folders, monkeypatch):
    monkeypatch.chdir(folders.data.parent)
    args = app.parse_args(["--data", "data", "--models", "models/../models", "--outputs", "outputs"])
    assert app.find_folders(args) == folders


def test_the_scripts_are_all_training_scripts(scripts):
    assert sorted(str(path.relative_to(ROOT)) for path, _ in scripts.values()) == sorted(TRAINING_SCRIPTS)


def test_the_end_of_the_form_stops_the_run_and_waits_for_it(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text(
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5)\n    print('saved checkpoint-3')\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\nprint('training', flush=True)\ntime.sleep(60)\n"
    )
    run = Run()
    run.start(Command([str(script)], {"output_dir": str(tmp_path / "out")}), tmp_path / "log")

    def press_ctrl_c(seconds):
        while "training" not in (tmp_path / "log").read_text():
            pass
        raise KeyboardInterrupt

    handled = []
    monkeypatch.setattr(app.signal, "signal", lambda number, handler: handled.append(number))
    monkeypatch.setattr(app.time, "sleep", press_ctrl_c)
    app.wait_for_end(run)
    assert run.process.returncode == 130
    assert "saves a checkpoint and stops" in capsys.readouterr().out.splitlines()[1]
    assert handled == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
