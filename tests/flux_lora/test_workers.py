"""The LoRA script on 2 and 3 ranks: the same run as on one, its checkpoints, and what happens when a rank is killed."""

import json
import os
import signal
import time

import pytest
from conftest import metrics
from msrun_job import Job, assert_same_run
from safetensors.numpy import load_file

from mindtune.models.lora_files import LORA_FILE
from mindtune.run.checkpoint import checkpoints, damage

SCRIPT = "flux_lora/train_dreambooth_lora_flux.py"
# The default of 1e-8 is below the rounding of this model's gradients, which it would make updates of.
MORE = ["--cache_latents", "--random_flip", "--adam_epsilon", 1e-4, "--learning_rate", 1e-3]
MORE += ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2]


@pytest.fixture(scope="module", autouse=True)
def two_ranks(tmp_path_factory):
    """The job of rank_checks.py. It mostly sleeps, so it starts before the first test and runs beside the others."""
    job = Job("tests/mindtune/distributed/rank_checks.py", 2, tmp_path_factory.mktemp("checks") / "out", [])
    yield job
    job.kill()


@pytest.fixture
def whole(finished_lora):
    """A run of one rank whose updates have six samples, of a data set of five."""
    return finished_lora(*MORE, "--train_batch_size", 6, "--max_train_steps", 4)


def test_two_ranks_then_three_then_one_are_the_run_of_one_rank(job, flags, lora, whole, tmp_path, capfd):
    """ZeRO 1 on two ranks in a graph, resumed on three in PyNative, and on one without ZeRO.

    Five samples, six per update: none is lost, none is used twice.
    """
    out, cache = tmp_path / "shared", tmp_path / "cache"
    more = [*MORE, "--cache_dir", cache]
    more += ["--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    two_flags = ["--max_train_steps", 2, "--gradient_accumulation_steps", 3, "--zero_stage", 1, "--mindspore_mode", 0]
    two = job(SCRIPT, 2, out, flags(out, *more, *two_flags))
    assert two.wait() == 0, two.said()[-6000:]
    # A prompt for two encoders, five images with two flips each; each rank encodes its shard.
    assert "encoder stage: 11 captions and images encoded" in two.said()
    assert len(list((cache / "mindtune").glob("*.safetensors"))) == 12
    three_flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--zero_stage", 1]
    three = job(SCRIPT, 3, out, flags(out, *more, *three_flags))
    assert three.wait() == 0, three.said()[-6000:]
    assert "resuming from checkpoint-2" in three.said()
    assert "resuming with other values of mindspore_mode than the checkpoint" in three.said()  # and of nothing else
    capfd.readouterr()
    lora(out, *more, "--max_train_steps", 4, "--train_batch_size", 3, "--gradient_accumulation_steps", 2)
    assert "not its exact continuation" not in capfd.readouterr().out
    assert_same_run(out, whole, 4)
    saved = load_file(checkpoints(whole)[-1] / "training_state.safetensors")
    state = [value.nbytes for name, value in saved.items() if name.startswith("optimizer.")]
    for done, ranks in ((two, 2), (three, 3)):
        bytes_per_rank = int(done.said().split("optimizer state: ")[1].split(" bytes")[0].replace(",", ""))
        # The two moments of a parameter are on the same rank.
        assert bytes_per_rank == pytest.approx(sum(state) / ranks, abs=2 * max(state))
    assert json.loads((out / "run.json").read_text())["workers"] == 1


def assert_ends(done, rank, since):
    """Within a minute, with the rank's number on the console, and without processes or partial checkpoints."""
    assert done.wait(timeout=60) != 0 and time.monotonic() - since < 60
    assert f"Error: rank {rank} of 2 " in done.said()
    deadline = time.monotonic() + 10
    while (left := done.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == {}
    assert [damage(folder) for folder in checkpoints(done.out)] == [None] * len(checkpoints(done.out))


def test_a_killed_rank_ends_the_job_and_the_same_command_resumes(job, flags, lora, whole, tmp_path):
    """Rank 1 in a step, rank 0 while it saves: the folder of its first checkpoint has no name yet."""
    out = tmp_path / "killed"
    more = [*MORE, "--train_batch_size", 3]
    more += ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    first = job(SCRIPT, 2, out, flags(out, *more, "--checkpointing_steps", 1))
    first.wait_for(lambda: checkpoints(out))
    since = time.monotonic()
    os.kill(first.worker(1), signal.SIGKILL)
    assert_ends(first, 1, since)
    count = len(checkpoints(out))
    second = job(SCRIPT, 2, out, flags(out, *more, "--checkpointing_steps", 1))
    second.wait_for(lambda: list(out.glob(".checkpoint-*.partial")))
    since = time.monotonic()
    os.kill(second.worker(0), signal.SIGKILL)
    assert_ends(second, 0, since)
    assert len(checkpoints(out)) >= count
    lora(out, *more, "--train_batch_size", 6)
    assert_same_run(out, whole, 4)


def test_sigterm_to_one_rank_stops_all_after_the_same_update(job, flags, whole, tmp_path):
    """`whole` has filled the encoder cache."""
    out = tmp_path / "stopped"
    two = job(SCRIPT, 2, out, flags(out, *MORE, "--max_train_steps", 10_000))
    two.wait_for(lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) >= 2)
    os.kill(two.worker(1), signal.SIGTERM)
    two.wait(timeout=60)
    (folder,) = checkpoints(out)
    assert damage(folder) is None and folder.name == f"checkpoint-{len(metrics(out))}"
    assert f"saved {folder} after update {len(metrics(out))}" in two.said()
    assert json.loads((out / "run.json").read_text())["finished"] is False


def test_a_rank_killed_while_it_encodes_leaves_its_shard_to_the_next_start(job, flags, lora, tmp_path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    more = [*MORE, "--cache_dir", cache, "--max_train_steps", 1, "--resume_from_checkpoint", "latest"]
    two = job(SCRIPT, 2, out, flags(out, *more))
    two.wait_for(lambda: list((cache / "mindtune").glob("*.safetensors")))
    since = time.monotonic()
    os.kill(two.worker(1), signal.SIGKILL)
    assert_ends(two, 1, since)
    count = len(list((cache / "mindtune").glob("*.safetensors")))
    lora(out, *more)
    assert count < 12 == len(list((cache / "mindtune").glob("*.safetensors")))
    assert (out / LORA_FILE).is_file()


def test_what_ranks_exchange(two_ranks):
    assert two_ranks.wait() == 0, two_ranks.said()[-6000:]
    assert two_ranks.said().count("all checks passed") == 2
