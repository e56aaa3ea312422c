"""The record of a run: its length, when something is due, what it logs, and which losses stop it."""

import json
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from conftest import metrics

from mindtune.cli import UserError
from mindtune.run import checkpoint, plan
from mindtune.run.record import Run, Settings


class Data:
    """Stands in for a run's data: ten samples."""

    def __init__(self):
        self.epoch_length = 10
        self.sizes = [(32, 32)]
        self.held_out = ["a", "b"]

    def fingerprint(self):
        return "data"

    def facts(self):
        return {"samples": 10}


class Start:
    """A started run of some settings in `out`, with one weight as its state."""

    def __init__(self, out, fixed=None, results=("adapter.bin",), data=None, **settings):
        chosen = Settings(**{"output_dir": str(out), "pretrained_model_name_or_path": "base", "seed": 3, **settings})
        self.run = Run(chosen, {"rank": 4}, results)
        self.run.set_data(data or Data())
        self.weight = ms.Parameter(ms.Tensor([1.0, 2.0], ms.float32), name="w")
        self.run.resume(fixed or {"rank": 4}, "base hash", {"optimizer.w": self.weight})
        self.run.start(
            SimpleNamespace(system="flux_lora"),
            50,
            {"model": 2},
            lambda folder: (folder / "adapter.bin").write_text("weights"),
        )

    def update(self, loss=1.0, norm=0.5, **values):
        assert not self.run.stopped()
        self.run.update([loss], lr=1e-3, grad_norm=norm, **values)


@pytest.fixture(autouse=True)
def no_memory_plan(monkeypatch):
    monkeypatch.setattr(plan, "measured", lambda settings: {})


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 3),  # ceil(10 / 4)
        ({"num_train_epochs": 3}, 8),  # ceil(30 / 4)
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 2}, 4),  # ceil(30 / 8)
        ({"max_train_steps": 7}, 7),
    ],
)
def test_the_length_of_a_run(tmp_path, settings, expected):
    run = Run(Settings(str(tmp_path / "out"), "base", **settings), {}, ("x",))
    run.set_data(Data())
    assert run.max_train_steps == expected
    assert run.samples_per_update == 4 * settings.get("gradient_accumulation_steps", 1)
    run.step = 2
    steps = settings.get("gradient_accumulation_steps", 1)
    assert run.batch_range() == (2 * steps, expected * steps)
    assert not (tmp_path / "out").exists()  # creating a run writes nothing


def test_due_at_multiples_but_not_at_the_end(tmp_path):
    run = Run(Settings(str(tmp_path), "base", max_train_steps=12), {}, ("x",))
    run.set_data(Data())

    def due_at(every):
        found = []
        for run.step in range(1, 13):
            if run.due(every):
                found.append(run.step)
        return found

    assert due_at(5) == [5, 10]
    assert due_at(4) == [4, 8]
    assert due_at(2.5) == [3, 5, 8, 10]  # epochs of 2.5 updates end within updates 3, 5, 8 and 10
    assert due_at(0.5) == list(range(1, 12))
    assert due_at(100) == []


def test_the_seed_is_the_given_one_the_checkpoint_s_or_a_random_one(tmp_path):
    assert Run(Settings(str(tmp_path), "base", seed=5), {}, ("x",)).seed == 5
    assert len({Run(Settings(str(tmp_path), "base"), {}, ("x",)).seed for _ in range(5)}) > 1
    started = Start(tmp_path / "out")
    started.update()
    started.run.save()
    resumed = Run(Settings(str(tmp_path / "out"), "base", resume_from_checkpoint="latest"), {}, ("x",))
    assert (resumed.seed, resumed.step) == (3, 1)


def test_an_update_logs_the_mean_of_its_losses(tmp_path, capfd):
    started = Start(tmp_path)
    assert not started.run.stopped()
    started.run.update([1.0, 2.0, 6.0], lr=1e-3, grad_norm=np.float32(0.5), d=1e-6)
    assert metrics(tmp_path) == [{"step": 1, "loss": 3.0, "lr": 1e-3, "grad_norm": 0.5, "d": 1e-6}]
    assert "10 samples per epoch, 2 held out; batch size 4 x 1 accumulation steps x 1 devices" in capfd.readouterr().out


@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("inf"))])
@pytest.mark.parametrize("scale", [{}, {"loss_scale": 1.0}])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, loss, norm, scale):
    started = Start(tmp_path, max_train_steps=9)
    for _ in range(2):
        started.update()
        started.run.save()
    with pytest.raises(UserError, match=rf"^update 3: the loss is {loss}, the gradient norm {norm}\. .*checkpoint-1\."):
        started.update(loss, norm, **scale)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


def test_an_overflow_in_fp16_is_skipped_and_counted(tmp_path, capfd):
    started = Start(tmp_path)
    started.update(2.0, float("inf"), loss_scale=32768.0)
    started.update(3.0, loss_scale=32768.0)
    assert started.run.skipped == 1
    first, second = metrics(tmp_path)
    assert first == {"step": 1, "loss": 2.0, "lr": 1e-3, "loss_scale": 32768.0} and second["loss"] == 3.0
    assert "update 1: overflow in fp16, skipped; loss scale 32768" in "".join(capfd.readouterr())


def test_a_checkpoint_has_state_weights_and_identity(tmp_path):
    started = Start(tmp_path, checkpoints_total_limit=1)
    for _ in range(2):
        started.update()
        started.run.save()
    (folder,) = checkpoint.checkpoints(tmp_path)
    assert folder.name == "checkpoint-2" and checkpoint.damage(folder) is None
    assert (folder / "adapter.bin").read_text() == "weights"
    assert json.loads((folder / "trainer_state.json").read_text()) == {
        "global_step": 2,
        "lr_schedule_steps": 50,
        "seed": 3,
        "data": "data",
        "base": "base hash",
        "samples_per_update": 4,
        "rank": 4,
    }
    again = Start(tmp_path, resume_from_checkpoint="latest")
    assert again.run.step == 2
    np.testing.assert_array_equal(again.weight.asnumpy(), [1.0, 2.0])


def test_resuming_reports_what_differs(tmp_path, capfd):
    started = Start(tmp_path)
    started.update()
    started.weight.set_data(ms.Tensor([5.0, 6.0], ms.float32))
    started.run.save()
    capfd.readouterr()
    same = Start(tmp_path, resume_from_checkpoint="latest")
    printed = capfd.readouterr().out
    assert "resuming from checkpoint-1 after update 1" in printed and "exact continuation" not in printed
    np.testing.assert_array_equal(same.weight.asnumpy(), [5.0, 6.0])
    Start(tmp_path, fixed={"rank": 8}, train_batch_size=2, resume_from_checkpoint="latest")
    message = "resuming with other values of samples_per_update, rank than the checkpoint: not its exact continuation"
    assert message in capfd.readouterr().out


def test_with_several_buckets_the_batch_size_is_part_of_the_identity(tmp_path):
    data = Data()
    data.sizes = [(32, 48), (48, 32)]
    assert Start(tmp_path, data=data).run.identity["batch_size"] == 4
    assert "batch_size" not in Start(tmp_path / "other").run.identity


def test_a_stopped_run_says_how_to_resume_and_is_not_finished(tmp_path, capfd):
    started = Start(tmp_path, max_train_steps=5)
    started.update()
    started.run.stop_request.exit_code = 130
    assert started.run.stopped()
    started.run.save()
    assert started.run.stop() == 130
    printed = capfd.readouterr().out
    assert f"saved {tmp_path / 'checkpoint-1'} after update 1" in printed
    assert "--resume_from_checkpoint latest" in printed
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is False


def test_a_finished_run_writes_its_record_and_report(tmp_path, capfd):
    started = Start(tmp_path, max_train_steps=2)
    for _ in range(2):
        started.update()
    started.run.save()
    assert started.run.finish("adapter", tmp_path / "adapter.bin", images=None) == 0
    printed = capfd.readouterr().out
    assert f"adapter: {tmp_path / 'adapter.bin'}" in printed and "report: " in printed and "images" not in printed
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["finished"] is True and record["updates"] == 2 and record["flags"] == {"rank": 4}
    assert record["seed"] == 3 and record["trainable"] == {"model": 2} and record["workers"] == 1
    assert record["data"] == {"fingerprint": "data", "samples": 10}
    assert (tmp_path / "report.html").is_file()


def test_overwriting_removes_only_another_run(tmp_path):
    started = Start(tmp_path)
    started.update()
    started.run.save()
    for name in ("final", "final-1", "final-holiday"):
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / "samples" / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds another run"):
        Start(tmp_path)
    Start(tmp_path, overwrite_output_dir=True)
    assert checkpoint.checkpoints(tmp_path) == [] and metrics(tmp_path) == []
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["final-holiday.png"]
