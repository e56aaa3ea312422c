"""The LoRA script with 2 and 3 real workers: the same run as with one, its checkpoints, and what happens when a worker is killed."""

import json
import os
import signal
import time

import pytest
from conftest import metrics
from msrun_job import assert_same_run
from safetensors.numpy import load_file

from mindtune.models.lora_files import LORA_FILE
from mindtune.run.checkpoint import checkpoints, damage

SCRIPT = "flux_lora/train_dreambooth_lora_flux.py"
# The default of 1e-8 is below the rounding of this model's gradients, which it would make updates of.
MORE = ["--cache_latents", "--random_flip", "--adam_epsilon", 1e-4, "--learning_rate", 1e-3]
MORE += ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2]


@pytest.fixture
def whole(flags, alone, tmp_path):
    """A run of one worker whose updates have six samples, of a data set of five."""
    out = tmp_path / "whole"
    alone(SCRIPT, flags(out, *MORE, "--train_batch_size", 6, "--max_train_steps", 4))
    return out


def test_two_workers_then_three_then_one_are_one_run_of_one_worker(job, flags, alone, whole, tmp_path):
    """ZeRO 1 with two workers, resumed with three, then without it and with one. Five samples, six an update: none lost, none twice."""
    out, more = (
        tmp_path / "shared",
        [*MORE, "--max_train_steps", 4, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"],
    )
    cache = tmp_path / "cache"
    two = job(
        SCRIPT,
        2,
        out,
        flags(out, *more, "--max_train_steps", 2, "--cache_dir", cache, "--train_batch_size", 3, "--zero_stage", 1),
    )
    assert two.wait() == 0, two.said()[-6000:]
    # A prompt for two encoders, five pictures with two flips each: 11 of them, of which each worker had its share.
    assert "encode stage: 11 made, 0 already" in two.said() and len(list((cache / "mindtune").iterdir())) == 12
    three = job(
        SCRIPT,
        3,
        out,
        flags(out, *more, "--max_train_steps", 3, "--cache_dir", cache, "--train_batch_size", 2, "--zero_stage", 1),
    )
    assert three.wait() == 0, three.said()[-6000:]
    assert "resuming from checkpoint-2" in three.said() and "not its exact continuation" not in three.said()
    alone(SCRIPT, flags(out, *more, "--cache_dir", cache, "--train_batch_size", 3, "--gradient_accumulation_steps", 2))
    assert_same_run(out, whole, 4)
    saved = load_file(checkpoints(whole)[-1] / "training_state.safetensors")
    state = [value.nbytes for name, value in saved.items() if name.startswith("optimizer.")]
    for done, workers in ((two, 2), (three, 3)):
        bytes_each = int(done.said().split("optimizer state: ")[1].split(" bytes")[0].replace(",", ""))
        assert bytes_each == pytest.approx(
            sum(state) / workers, abs=2 * max(state)
        )  # a parameter's two moments stay together
    assert json.loads((out / "run.json").read_text())["workers"] == 1


def test_in_the_graph_too_with_accumulation(job, flags, whole, tmp_path):
    out = tmp_path / "graph"
    more = [
        "--train_batch_size",
        1,
        "--gradient_accumulation_steps",
        3,
        "--mindspore_mode",
        0,
        "--zero_stage",
        1,
        "--max_train_steps",
        4,
    ]
    two = job(SCRIPT, 2, out, flags(out, *MORE, *more))
    assert two.wait() == 0, two.said()[-6000:]
    assert_same_run(out, whole, 4)


def assert_ends(done, number, since):
    """Within a minute, with the worker's number on the console, no process and no half checkpoint left."""
    assert done.wait(timeout=60) != 0 and time.monotonic() - since < 60
    assert f"Error: worker {number} of 2 " in done.said()
    deadline = time.monotonic() + 10
    while (left := done.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == {}
    assert [damage(folder) for folder in checkpoints(done.out)] == [None] * len(checkpoints(done.out))


def test_a_killed_worker_ends_the_job_and_the_same_command_goes_on(job, flags, alone, whole, tmp_path):
    """Worker 1 in a step, worker 0 in a save (the first checkpoint's folder is there and has no name yet)."""
    out = tmp_path / "killed"
    more = [*MORE, "--train_batch_size", 3, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    first = job(SCRIPT, 2, out, flags(out, *more, "--checkpointing_steps", 1))
    first.wait_for(lambda: checkpoints(out))
    since = time.monotonic()
    os.kill(first.worker(1), signal.SIGKILL)
    assert_ends(first, 1, since)
    had = len(checkpoints(out))
    second = job(SCRIPT, 2, out, flags(out, *more, "--checkpointing_steps", 1))
    second.wait_for(lambda: list(out.glob(".checkpoint-*.partial")))
    since = time.monotonic()
    os.kill(second.worker(0), signal.SIGKILL)
    assert_ends(second, 0, since)
    assert len(checkpoints(out)) >= had
    alone(SCRIPT, flags(out, *more, "--train_batch_size", 6))
    assert_same_run(out, whole, 4)


def test_sigterm_to_one_worker_stops_all_after_the_same_update(job, flags, tmp_path):
    out = tmp_path / "stopped"
    two = job(SCRIPT, 2, out, flags(out, *MORE, "--max_train_steps", 10_000))
    two.wait_for(lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) >= 2)
    os.kill(two.worker(1), signal.SIGTERM)
    two.wait(timeout=60)
    (folder,) = checkpoints(out)
    assert damage(folder) is None and folder.name == f"checkpoint-{len(metrics(out))}"
    assert f"saved {folder} after update {len(metrics(out))}" in two.said()
    assert json.loads((out / "run.json").read_text())["finished"] is False


def test_a_worker_killed_while_it_encodes_leaves_its_part_to_the_next_start(job, flags, alone, tmp_path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    more = [*MORE, "--cache_dir", cache, "--max_train_steps", 1, "--resume_from_checkpoint", "latest"]
    two = job(SCRIPT, 2, out, flags(out, *more))
    two.wait_for(
        lambda: any(
            line.endswith(".safetensors")
            for line in (os.listdir(cache / "mindtune") if (cache / "mindtune").is_dir() else [])
        )
    )
    since = time.monotonic()
    os.kill(two.worker(1), signal.SIGKILL)
    assert_ends(two, 1, since)
    had = len(list((cache / "mindtune").glob("*.safetensors")))
    alone(SCRIPT, flags(out, *more))
    assert had < 12 == len(list((cache / "mindtune").glob("*.safetensors")))
    assert (out / LORA_FILE).is_file()
