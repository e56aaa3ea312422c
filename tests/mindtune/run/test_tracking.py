"""Records of a run: metrics that survive a kill and a resume, tracking services, versions, memory, loss by timestep."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.run.tracking import LossByTimestep, Tracker, package_versions, peak_memory_mb, services, write_run_json


def tracker(folder, resumed=0, tensorboard=False):
    return Tracker(folder, folder / "logs", ("tensorboard",) if tensorboard else (), resumed)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder, first, last, resumed=0, **more):
    run = tracker(folder, resumed)
    for step in range(first, last):
        run.log(step, loss=step / 10, **more)
    run.close()


# ---- metrics.jsonl -------------------------------------------------------------------------------


def test_each_update_is_a_line_of_json(tmp_path):
    log(tmp_path, 1, 4, lr=1e-4)
    assert lines(tmp_path) == [{"step": step, "loss": step / 10, "lr": 1e-4} for step in (1, 2, 3)]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    run = tracker(tmp_path)
    run.log(1, loss=0.5)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    run.close()


def test_a_new_run_starts_an_empty_file(tmp_path):
    log(tmp_path, 1, 4)
    log(tmp_path, 1, 2)
    assert [row["step"] for row in lines(tmp_path)] == [1]


def test_a_resumed_run_has_every_update_once(tmp_path):
    """The first run got to 9; the checkpoint is of update 5."""
    log(tmp_path, 1, 10, run=1)
    log(tmp_path, 6, 12, resumed=5, run=2)
    expected = [(step, 1) for step in range(1, 6)] + [(step, 2) for step in range(6, 12)]
    assert [(row["step"], row["run"]) for row in lines(tmp_path)] == expected


def test_an_incomplete_last_line_is_dropped(tmp_path):
    """A kill in the middle of a write leaves one."""
    log(tmp_path, 1, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    log(tmp_path, 4, 5, resumed=3)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_resumed_run_without_a_file_starts_one(tmp_path):
    log(tmp_path, 6, 8, resumed=5)
    assert [row["step"] for row in lines(tmp_path)] == [6, 7]


def events(folder):
    """The events in TensorBoard's files. A record: length (8 bytes), checksum (4), the event, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.tfevents*")):
        content = path.read_bytes()
        offset = 0
        while offset < len(content):
            length = int.from_bytes(content[offset : offset + 8], "little")
            yield Event.FromString(content[offset + 12 : offset + 12 + length])
            offset += 12 + length + 4


def test_tensorboard_gets_scalars_with_slashes_and_images(tmp_path):
    run = tracker(tmp_path, tensorboard=True)
    run.log(3, loss=0.25, held_out__loss=0.5)
    run.image(3, "validation", Image.new("RGB", (7, 5)))
    run.close()
    values = [(event.step, value) for event in events(tmp_path / "logs") for value in event.summary.value]
    scalars = [(step, value.tag, value.simple_value) for step, value in values[:2]]
    assert scalars == [(3, "loss", 0.25), (3, "held_out/loss", 0.5)]
    ((step, value),) = values[2:]
    assert (step, value.tag, value.image.width, value.image.height) == (3, "validation", 7, 5)


def test_tensorboard_drops_the_updates_that_a_resumed_run_repeats(tmp_path):
    """A session start at the first repeated update makes TensorBoard do that."""
    run = tracker(tmp_path, resumed=5, tensorboard=True)
    run.log(6, loss=0.5)
    run.close()
    starts = [event.step for event in events(tmp_path / "logs") if event.session_log.status == event.session_log.START]
    assert starts == [6]


def test_without_tensorboard_there_is_no_log_folder(tmp_path):
    run = tracker(tmp_path)
    run.image(1, "validation", Image.new("RGB", (7, 5)))
    run.flush()
    run.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- W&B and SwanLab -----------------------------------------------------------------------------

OFFLINE = """
import sys
from pathlib import Path
from PIL import Image
from mindtune.run.tracking import Tracker, services

folder = Path(sys.argv[1])
for resumed in (0, 2):
    run = Tracker(folder, folder / "logs", services("all"), resumed, {"learning_rate": 0.125})
    for step in range(resumed + 1, resumed + 4):
        run.log(step, loss=step / 10, held_out__loss=0.5)
    run.image(resumed + 3, "validation", Image.new("RGB", (7, 5), "red"))
    run.close()
"""


def test_all_services_offline_and_the_same_run_after_a_resume(tmp_path, monkeypatch):
    """Both services write files to be sent later, with the same id before and after a resume.

    In a separate process, because both services leave threads and hooks behind.
    """
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    for name in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.setenv(name, "offline")
    subprocess.run([sys.executable, script, tmp_path], cwd=tmp_path, check=True, timeout=300)
    run_id = (tmp_path / "logs" / "run_id.txt").read_text()
    wandb = sorted((tmp_path / "logs" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(wandb) == 2 and all(path.stat().st_size for path in wandb)
    assert len(list((tmp_path / "logs").glob(f"swanlab/run-*/run-{run_id}.swanlab"))) == 2
    images = [path for path in (tmp_path / "logs").rglob("*.png") if Image.open(path).size == (7, 5)]
    assert len(images) == 4 and list((tmp_path / "logs").glob("events.out.tfevents*"))
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_that_nobody_is_logged_in_to_is_refused(name, monkeypatch, tmp_path, capsys):
    for variable in ("WANDB_MODE", "SWANLAB_MODE", "WANDB_API_KEY", "SWANLAB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    message = f"--report_to {name}: nobody is logged in; run `{name} login`, or set {name.upper()}_MODE=offline"
    with pytest.raises(UserError, match=message):
        services(name)
    assert services("all") == ("tensorboard",) and f"without {name}" in capsys.readouterr().out


def test_a_service_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to wandb: the package wandb is not installed; pip install wandb"):
        services("wandb")


def test_services_that_need_no_login():
    assert services("none") == () and services("tensorboard") == ("tensorboard",)


# ---- run.json ------------------------------------------------------------------------------------


def test_run_json_has_the_content_of_the_last_call_with_paths_as_strings(tmp_path):
    write_run_json(tmp_path / "run.json", flags={"output_dir": tmp_path}, seed=3)
    write_run_json(tmp_path / "run.json", flags={"output_dir": tmp_path}, seed=4)
    assert json.loads((tmp_path / "run.json").read_text()) == {"flags": {"output_dir": str(tmp_path)}, "seed": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_versions_are_those_of_the_modules():
    import mindspore
    import transformers

    found = package_versions()
    assert found["mindspore"] == mindspore.__version__
    assert found["numpy"] == np.__version__
    assert found["transformers"] == transformers.__version__
    assert found["python"].count(".") == 2


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr("mindtune.run.tracking.PACKAGES", ("no-such-package",))
    assert package_versions()["no-such-package"] is None


def test_peak_memory_is_in_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    recorded = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    assert peak_memory_mb()["training_process"] == pytest.approx(recorded, abs=8)


def test_the_peak_does_not_include_the_parent_process():
    """The parent holds 900 MB when it starts the process."""
    parent = "import subprocess, sys; held = b'x' * (900 << 20); subprocess.run(sys.argv[1:], check=True)"
    code = "from mindtune.run.tracking import peak_memory_mb; print(peak_memory_mb()['training_process'])"
    command = [sys.executable, "-c", parent, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 10 < int(done.stdout) < 800


def test_peak_memory_of_a_child():
    """The child holds 150 MB."""
    subprocess.run([sys.executable, "-c", "b'x' * (150 << 20)"], check=True)
    assert 150 <= peak_memory_mb()["encode_process"] < 100_000


# ---- the loss by timestep ------------------------------------------------------------------------


def table(folder):
    with open(folder / "loss_by_timestep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(int(row["step"]), float(row["sigma"]), float(row["loss"])) for row in rows]


def test_the_table_keeps_every_digit(tmp_path):
    curve = LossByTimestep(tmp_path, 0)
    assert not curve.has(0)
    curve.add(0, [0.1, 0.9], [1 / 3, 2e-17])
    curve.add(10, [0.1, 0.9], [0.25, 0.5])
    assert table(tmp_path) == [(0, 0.1, 1 / 3), (0, 0.9, 2e-17), (10, 0.1, 0.25), (10, 0.9, 0.5)]
    assert curve.has(0) and curve.has(10) and not curve.has(5)


def test_a_resumed_table_drops_the_updates_that_are_repeated(tmp_path):
    curve = LossByTimestep(tmp_path, 0)
    for step in (0, 10, 20):
        curve.add(step, [0.1, 0.9], [step + 0.5, step + 0.25])
    resumed = LossByTimestep(tmp_path, 10)
    assert resumed.has(10) and not resumed.has(20)
    resumed.add(20, [0.1, 0.9], [7.0, 8.0])
    before = [(0, 0.1, 0.5), (0, 0.9, 0.25), (10, 0.1, 10.5), (10, 0.9, 10.25)]
    assert table(tmp_path) == [*before, (20, 0.1, 7.0), (20, 0.9, 8.0)]


def test_an_incomplete_table_keeps_its_complete_lines(tmp_path):
    LossByTimestep(tmp_path, 0).add(1, [0.1, 0.9], [1.0, 2.0])
    path = tmp_path / "loss_by_timestep.csv"
    path.write_text(path.read_text()[:-2])
    assert LossByTimestep(tmp_path, 1).rows == [(1, 0.1, 1.0)]


def test_the_plot_has_at_most_six_curves_with_the_first_and_the_last(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.append((style["label"], list(x), list(y))))
    monkeypatch.setattr(Axes, "legend", lambda self, **style: None)
    curve = LossByTimestep(tmp_path, 0)
    for step in range(0, 200, 10):
        curve.add(step, [0.9, 0.1], [step + 0.5, step + 0.25])
    path = curve.plot()
    assert len(drawn) == 6 and [drawn[0][0], drawn[-1][0]] == ["after 0 updates", "after 190 updates"]
    assert drawn[-1][1:] == ([0.1, 0.9], [190.25, 190.5])  # in order of sigma
    assert path == tmp_path / "loss_by_timestep.png" and Image.open(path).format == "PNG"


def test_without_rows_there_is_no_plot(tmp_path):
    assert LossByTimestep(tmp_path, 0).plot() is None and list(tmp_path.iterdir()) == []
