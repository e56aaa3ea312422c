"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

import json
import shutil
import signal

import numpy as np
import pytest
from conftest import metrics
from killed_runs import assert_a_killed_process_resumes, assert_resumes_exactly, last_state, start, wait_until
from safetensors.numpy import load_file

from mindtune.cli import UserError
from mindtune.run.checkpoint import checkpoints, damage

from .conftest import FINAL, TRAIN

# What must be equal to the byte, besides the last checkpoint: the ControlNet and the logged values.
RESULTS = FINAL, "config.json", "metrics.jsonl"


CASES = {
    "cached latents, average and cosine": [
        "--cache_latents", "--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", 2,
    ],
    "stream, accumulation, empty captions": [
        "--streaming", "--shuffle_buffer_size", 3, "--gradient_accumulation_steps", 2,
        "--proportion_empty_prompts", 0.3,
    ],
    "fp16, buckets, flips": [
        "--mixed_precision", "fp16", "--aspect_ratio_buckets", "32,48;48,32", "--random_flip", "--cache_latents",
        "--dataloader_num_workers", 2,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_not_killed(control, oblong, tmp_path, capfd, case):
    more = [*CASES[case], *(["--train_data_dir", oblong] if "buckets" in case else [])]
    assert_resumes_exactly(control, more, tmp_path, RESULTS, capfd, kills=1 if "fp16" in case else 2)


def test_a_process_that_is_killed_and_resumed_equals_one_that_is_not(control, control_flags, tmp_path):
    assert_a_killed_process_resumes(TRAIN, control_flags, control, ["--cache_latents"], tmp_path, RESULTS)


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


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(finished_control, control, tmp_path, capfd):
    more = ["--cache_latents", "--checkpointing_steps", 1, "--max_train_steps"]
    whole = finished_control(*more, 3)
    out = shutil.copytree(finished_control(*more, 2), tmp_path / "torn")
    weights = out / "checkpoint-2" / "flux_controlnet" / FINAL
    weights.write_bytes(weights.read_bytes()[:-100])
    control(out, *more, 3, "--resume_from_checkpoint", "latest")
    printed = capfd.readouterr().out
    assert f"checkpoint-2: flux_controlnet/{FINAL} is damaged" in printed
    assert "resuming from checkpoint-1" in printed
    assert last_state(out, *RESULTS) == last_state(whole, *RESULTS)


def test_ctrl_c_saves_and_the_same_command_resumes(control, control_flags, tmp_path, capfd):
    out, log, more = tmp_path / "run", tmp_path / "log", ["--cache_latents", "--max_train_steps"]
    with open(log, "w") as file:
        process = start(TRAIN, control_flags(out, *more, 10_000), file)
        wait_until(lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) >= 2, process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    (folder,) = checkpoints(out)
    updates = int(folder.name.split("-")[1])
    assert damage(folder) is None and f"saved {folder} after update {updates}" in log.read_text()
    assert not (out / FINAL).exists() and json.loads((out / "run.json").read_text())["finished"] is False
    control(out, *more, updates + 1, "--resume_from_checkpoint", "latest")
    assert f"resuming from checkpoint-{updates} after update {updates}" in capfd.readouterr().out
    assert [line["step"] for line in metrics(out)] == list(range(1, updates + 2)) and (out / FINAL).is_file()


def test_another_size_is_refused_and_another_batch_size_reported(control, tiny_flux, tmp_path, capfd):
    more = ["--pretrained_model_name_or_path", tiny_flux, "--cache_latents", "--resume_from_checkpoint", "latest"]
    out, more = tmp_path / "run", [*more, "--max_train_steps"]
    control(out, *more, 1)
    with pytest.raises(UserError, match=r"controlnet_blocks\.1\..*: the checkpoint has no such state"):
        control(out, *more, 2, "--num_double_layers", 2)
    with pytest.raises(UserError, match=r"ema\..*: the checkpoint has no such state"):
        control(out, *more, 2, "--use_ema")
    control(out, *more, 2, "--train_batch_size", 2, "--proportion_empty_prompts", 0.5)
    message = "resuming with other values of samples_per_update, proportion_empty_prompts than the checkpoint"
    assert message in capfd.readouterr().out
    assert json.loads((out / "run.json").read_text())["finished"] is True
