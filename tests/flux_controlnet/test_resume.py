"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import command, metrics
from safetensors.numpy import load_file

from mindtune.cli import UserError
from mindtune.run.checkpoint import checkpoints, damage

from .conftest import FINAL, TRAIN


def start(arguments, log):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command(TRAIN, arguments), stdout=log, stderr=subprocess.STDOUT, env=environment)


def kill_somewhere(arguments, out, chance, after):
    """Starts a run and ends it by SIGKILL up to a second after `after()` is true: within a step, a save, or a log line."""
    with open(out.parent / "killed.log", "w") as log:
        process = start(arguments, log)
        while not after() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()


def end_state(out):
    """What must be the same to the byte: the ControlNet, the optimizer with everything around it, and the logged losses."""
    last = checkpoints(out)[-1]
    files = [
        out / FINAL,
        out / "config.json",
        out / "metrics.jsonl",
        *(path for path in last.rglob("*") if path.is_file()),
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


CASES = {
    "cached latents, average and cosine": ["--cache_latents", "--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", 2],
    "stream, accumulation, empty captions": ["--streaming", "--shuffle_buffer_size", 3, "--gradient_accumulation_steps", 2,
                                             "--proportion_empty_prompts", 0.3],
    "fp16, buckets, flips": ["--mixed_precision", "fp16", "--aspect_ratio_buckets", "32,48;48,32", "--random_flip", "--cache_latents",
                             "--dataloader_num_workers", 2],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_twice_and_resumed_equals_left_alone(control, control_flags, oblong, tmp_path, capsys, case):
    more = [*CASES[case], "--max_train_steps", 10, "--checkpointing_steps", 2]
    if "fp16" in case:  # which a CPU computes slowly
        more += ["--train_data_dir", oblong, "--max_train_steps", 7, "--checkpointing_steps", 1]
    control(tmp_path / "whole", *more)
    out, chance = tmp_path / "killed", random.Random()
    resumed = [*more, "--resume_from_checkpoint", "latest"]
    # The first kill may come before the first checkpoint; the run then starts over.
    kill_somewhere(control_flags(out, *more), out, chance, after=(out / "metrics.jsonl").exists)
    had = len(checkpoints(out))
    kill_somewhere(control_flags(out, *resumed), out, chance, after=lambda: len(checkpoints(out)) > had)
    capsys.readouterr()
    control(out, *resumed)
    said = capsys.readouterr().out
    assert "resuming from checkpoint-" in said and "not its exact continuation" not in said
    assert end_state(out) == end_state(tmp_path / "whole")


def test_the_state_of_everything_is_in_a_checkpoint(control, tmp_path):
    """Adam's moments and count, the average, and fp16's loss scale with its counter: every weight's, in float32."""
    more = ["--cache_latents", "--use_ema", "--mixed_precision", "fp16", "--max_train_steps", 2]
    control(tmp_path / "run", *more)
    (folder,) = checkpoints(tmp_path / "run")
    weights, state = load_file(folder / "flux_controlnet" / FINAL), load_file(folder / "training_state.safetensors")
    for kind in ("exp_avg.", "exp_avg_sq."):
        assert sum(value.size for name, value in state.items() if f".{kind}" in name) == sum(
            value.size for value in weights.values()
        )
    averages = {name[len("ema.") :]: value for name, value in state.items() if name.startswith("ema.")}
    assert {name: value.shape for name, value in averages.items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert any(not np.array_equal(averages[name], value) for name, value in weights.items())
    assert {"loss_scale", "loss_scale_counter"} <= set(state)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(control, tmp_path, capsys):
    more = ["--cache_latents", "--checkpointing_steps", 2, "--max_train_steps", 6]
    control(tmp_path / "whole", *more)
    out = tmp_path / "torn"
    control(out, *more, "--max_train_steps", 4)
    weights = out / "checkpoint-4" / "flux_controlnet" / FINAL
    weights.write_bytes(weights.read_bytes()[:-100])
    control(out, *more, "--resume_from_checkpoint", "latest")
    said = capsys.readouterr().out
    assert (
        f"checkpoint-4: flux_controlnet/{FINAL} is damaged; falling back" in said
        and "resuming from checkpoint-2" in said
    )
    assert end_state(out) == end_state(tmp_path / "whole")


def test_ctrl_c_saves_and_the_same_command_goes_on(control, control_flags, tmp_path, capsys):
    out, more = tmp_path / "run", ["--cache_latents", "--max_train_steps"]
    with open(tmp_path / "log", "w") as log:
        process = start(control_flags(out, *more, 10_000), log)
        deadline = time.monotonic() + 120
        while not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    (folder,) = checkpoints(out)
    updates = int(folder.name.split("-")[1])
    assert damage(folder) is None and f"saved {folder} after update {updates}" in (tmp_path / "log").read_text()
    assert not (out / FINAL).exists() and json.loads((out / "run.json").read_text())["finished"] is False
    control(out, *more, updates + 1, "--resume_from_checkpoint", "latest")
    assert f"resuming from checkpoint-{updates} after update {updates}" in capsys.readouterr().out
    assert [line["step"] for line in metrics(out)] == list(range(1, updates + 2)) and (out / FINAL).is_file()


def test_another_size_is_refused_and_another_batch_is_said(control, tiny_flux, tmp_path, capsys):
    out, more = (
        tmp_path / "run",
        [
            "--pretrained_model_name_or_path",
            tiny_flux,
            "--cache_latents",
            "--resume_from_checkpoint",
            "latest",
            "--max_train_steps",
        ],
    )
    control(out, *more, 1)
    with pytest.raises(UserError, match=r"controlnet_blocks\.1\..*: the checkpoint has no such state"):
        control(out, *more, 2, "--num_double_layers", 2)
    with pytest.raises(UserError, match=r"ema\..*: the checkpoint has no such state"):
        control(out, *more, 2, "--use_ema")
    control(out, *more, 2, "--train_batch_size", 2, "--proportion_empty_prompts", 0.5)
    said = "resuming with another samples_per_update, proportion_empty_prompts than the checkpoint was made with"
    assert said in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["finished"] is True
