"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import command

from mindtune.models.lora_files import LORA_FILE
from mindtune.run.checkpoint import checkpoints, damage

SCRIPT = "flux_lora/train_dreambooth_lora_flux.py"


def start(arguments, log):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command(SCRIPT, arguments), stdout=log, stderr=subprocess.STDOUT, env=environment)


def kill_somewhere(arguments, out, chance, after):
    """Starts a run and ends it by SIGKILL up to 1.5 s after `after()` is true: within a step, a save, or a log line."""
    with open(out.parent / "killed.log", "w") as log:
        process = start(arguments, log)
        while not after() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()


def end_state(out):
    """What must be the same to the byte: the adapter, the optimizer with everything around it, and the logged losses."""
    last = checkpoints(out)[-1]
    files = [
        out / LORA_FILE,
        last / "training_state.safetensors",
        last / LORA_FILE,
        last / "trainer_state.json",
        out / "metrics.jsonl",
    ]
    return {path.name: path.read_bytes() for path in files}


CASES = {
    "cached latents and cosine": [
        "--cache_latents",
        "--random_flip",
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        2,
    ],
    "fresh crops, accumulation and adafactor": [
        "--random_flip",
        "--gradient_accumulation_steps",
        2,
        "--optimizer",
        "adafactor",
    ],
    "clip trained in fp16, 8-bit": [
        "--cache_latents",
        "--train_text_encoder",
        "--mixed_precision=fp16",
        "--use_8bit_adam",
        "--rank=128",
    ],
    "prodigy in the graph": ["--cache_latents", "--optimizer", "prodigy", "--learning_rate", 1, "--mindspore_mode", 0],
    "buckets with prior preservation": [
        "--aspect_ratio_buckets=48,32;32,48",
        "--with_prior_preservation",
        "--train_batch_size=2",
        "--validation_split=0.2",
    ],
    "prior preservation and held-out loss": [
        "--with_prior_preservation",
        "--validation_split",
        0.2,
        "--validation_epochs",
        1,
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_killed_twice_and_resumed_equals_left_alone(train, flags, tmp_path, case):
    more = [*CASES[case], "--max_train_steps", 12, "--checkpointing_steps", 2]
    if "prior" in case:
        more += ["--class_data_dir", tmp_path / "class", "--class_prompt", "a photo of a cat", "--num_class_images", 3]
    train(tmp_path / "whole", *more, check=0)
    out, chance = tmp_path / "killed", random.Random()
    resumed = [*more, "--resume_from_checkpoint", "latest"]
    # The first kill may come before the first checkpoint; the run then starts over.
    kill_somewhere(flags(out, *more), out, chance, after=(out / "metrics.jsonl").exists)
    had = len(checkpoints(out))
    kill_somewhere(flags(out, *resumed), out, chance, after=lambda: len(checkpoints(out)) > had)
    last = train(out, *resumed, check=0)
    assert "resuming from checkpoint-" in last.stdout
    assert end_state(out) == end_state(tmp_path / "whole")


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(train, tmp_path):
    more = ["--cache_latents", "--checkpointing_steps", 2, "--max_train_steps", 6]
    train(tmp_path / "whole", *more, check=0)
    out = tmp_path / "torn"
    train(out, *more, "--max_train_steps", 4, check=0)
    state = out / "checkpoint-4" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    done = train(out, *more, "--resume_from_checkpoint", "latest", check=0)
    assert "checkpoint-4: training_state.safetensors is damaged; falling back" in done.stdout
    assert "resuming from checkpoint-2" in done.stdout
    assert end_state(out) == end_state(tmp_path / "whole")


def test_resume_by_name_and_by_path_and_a_limit_on_checkpoints(train, tmp_path):
    more = ["--cache_latents", "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    out = tmp_path / "run"
    train(out, *more, "--max_train_steps", 3, check=0)
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]
    done = train(out, *more, "--max_train_steps", 4, "--resume_from_checkpoint", "checkpoint-2", check=0)
    assert "resuming from checkpoint-2" in done.stdout
    done = train(
        tmp_path / "other", *more, "--max_train_steps", 4, "--resume_from_checkpoint", out / "checkpoint-3", check=0
    )
    assert "resuming from checkpoint-3" in done.stdout
    assert (out / LORA_FILE).read_bytes() == (tmp_path / "other" / LORA_FILE).read_bytes()
    assert [damage(folder) for folder in checkpoints(out)] == [None, None]


def test_resume_with_another_rank_is_refused_and_another_batch_is_said(train, tmp_path):
    out = tmp_path / "run"
    train(out, "--cache_latents", "--max_train_steps", 1, check=0)
    again = ["--cache_latents", "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    refused = train(out, *again, "--lora_rank", 8, check=2)
    assert "has shape" in refused.stdout and "Traceback" not in refused.stdout
    changed = train(out, *again, "--train_batch_size", 2, "--weighting_scheme", "cosmap", check=0)
    assert (
        "resuming with another samples_per_update, weighting_scheme than the checkpoint was made with" in changed.stdout
    )
    assert json.loads((out / "run.json").read_text())["finished"] is True


def test_resuming_never_overwrites_another_run(train, tmp_path):
    """Neither a checkpoint of elsewhere nor a missing one is a licence to replace a finished adapter."""
    for name in ("one", "other"):
        train(tmp_path / name, "--cache_latents", "--max_train_steps", 1, check=0)
    before = (tmp_path / "other" / LORA_FILE).read_bytes()
    more = ["--cache_latents", "--max_train_steps", 2, "--resume_from_checkpoint"]
    assert "holds another run" in train(tmp_path / "other", *more, tmp_path / "one" / "checkpoint-1", check=2).stdout
    shutil.rmtree(tmp_path / "other" / "checkpoint-1")
    assert "holds another run" in train(tmp_path / "other", *more, "latest", check=2).stdout
    assert (tmp_path / "other" / LORA_FILE).read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(train, tmp_path):
    out = tmp_path / "run"
    train(out, "--cache_latents", "--max_train_steps", 2, check=0)
    before = end_state(out)
    train(out, "--cache_latents", "--max_train_steps", 2, "--resume_from_checkpoint", "latest", check=0)
    assert end_state(out) == before
