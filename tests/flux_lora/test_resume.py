"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

import json
import shutil

import pytest
from killed_runs import assert_a_killed_process_resumes, assert_resumes_exactly, last_state

from mindtune.cli import UserError
from mindtune.models.lora_files import LORA_FILE
from mindtune.run.checkpoint import checkpoints, damage

SCRIPT = "flux_lora/train_dreambooth_lora_flux.py"
# What must be equal to the byte, besides the last checkpoint: the adapter and the logged values.
RESULTS = LORA_FILE, "metrics.jsonl"


CASES = {
    "cached latents and cosine": [
        "--cache_latents", "--random_flip", "--lr_scheduler", "cosine", "--lr_warmup_steps", 2,
    ],
    "random crops, accumulation and adafactor": [
        "--random_flip", "--gradient_accumulation_steps", 2, "--optimizer", "adafactor",
    ],
    "CLIP trained in bf16, 8-bit": [
        "--cache_latents", "--train_text_encoder", "--mixed_precision", "bf16", "--use_8bit_adam", "--rank", 128,
    ],
    "DoRA with CLIP in bf16": [
        "--cache_latents", "--adapter", "dora", "--train_text_encoder", "--mixed_precision", "bf16",
        "--learning_rate", 1e-2,
    ],
    "LoKr with int8 and recomputation": [
        "--cache_latents", "--adapter", "lokr", "--base_precision", "int8", "--gradient_checkpointing",
        "--learning_rate", 1e-2,
    ],
    "prodigy in the graph": ["--cache_latents", "--optimizer", "prodigy", "--learning_rate", 1, "--mindspore_mode", 0],
    "buckets with prior preservation": [
        "--aspect_ratio_buckets", "48,32;32,48", "--with_prior_preservation", "--train_batch_size", 2,
        "--validation_split", 0.2, "--validation_epochs", 1,
    ],
    "an average, tags in two resolutions and smooth_l1": [
        "--use_ema", "--resolution", "32,48", "--auto_buckets", "--bucket_step", 16, "--shuffle_tags",
        "--caption_dropout", 0.3, "--instance_prompt", "a, b, c", "--trigger_word", "sks", "--loss", "smooth_l1",
        "--masked_loss", "--timestep_shift", "auto", "--validation_split", 0.2, "--validation_epochs", 1,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_not_killed(lora, tmp_path, capfd, case):
    more = [*CASES[case]]
    if "prior" in case:
        more += ["--class_data_dir", tmp_path / "class", "--class_prompt", "a photo of a cat", "--num_class_images", 3]
    kills = 1 if "graph" in case else 2  # every start compiles
    assert_resumes_exactly(lora, more, tmp_path, RESULTS, capfd, kills)


def test_a_process_that_is_killed_and_resumed_equals_one_that_is_not(lora, flags, tmp_path):
    assert_a_killed_process_resumes(SCRIPT, flags, lora, ["--cache_latents"], tmp_path, RESULTS)


def test_resume_by_name_and_by_path_and_from_before_a_truncated_checkpoint(finished_lora, lora, tmp_path, capfd):
    """With a limit on the number of checkpoints."""
    more = ["--cache_latents", "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    whole = finished_lora(*more, "--max_train_steps", 4)
    assert [folder.name for folder in checkpoints(whole)] == ["checkpoint-3", "checkpoint-4"]
    assert [damage(folder) for folder in checkpoints(whole)] == [None, None]
    run = finished_lora(*more, "--max_train_steps", 3)
    resumed = [*more, "--max_train_steps", 4, "--resume_from_checkpoint"]

    by_path = lora(tmp_path / "by path", *resumed, run / "checkpoint-3")
    assert "resuming from checkpoint-3" in capfd.readouterr().out
    assert (by_path / LORA_FILE).read_bytes() == (whole / LORA_FILE).read_bytes()

    by_name = lora(shutil.copytree(run, tmp_path / "by name"), *resumed, "checkpoint-2")
    assert "resuming from checkpoint-2" in capfd.readouterr().out
    assert last_state(by_name, *RESULTS) == last_state(whole, *RESULTS)

    torn = shutil.copytree(run, tmp_path / "torn")
    state = torn / "checkpoint-3" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    lora(torn, *resumed, "latest")
    printed = capfd.readouterr().out
    assert "checkpoint-3: training_state.safetensors is damaged" in printed
    assert "resuming from checkpoint-2" in printed
    assert last_state(torn, *RESULTS) == last_state(whole, *RESULTS)


def test_another_rank_is_refused_and_another_batch_size_reported(finished_lora, lora, tmp_path, capfd):
    out = shutil.copytree(finished_lora("--cache_latents", "--max_train_steps", 1), tmp_path / "run")
    again = ["--cache_latents", "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match="has shape"):
        lora(out, *again, "--lora_rank", 8)
    lora(out, *again, "--train_batch_size", 2, "--weighting_scheme", "cosmap")
    assert (
        "resuming with other values of samples_per_update, weighting_scheme than the checkpoint"
        in capfd.readouterr().out
    )
    assert json.loads((out / "run.json").read_text())["finished"] is True


def test_resuming_never_overwrites_another_run(finished_lora, lora, tmp_path):
    """Neither with a checkpoint of another directory nor if the checkpoint is missing."""
    one = finished_lora("--cache_latents", "--max_train_steps", 1)
    other = shutil.copytree(one, tmp_path / "other")
    before = (other / LORA_FILE).read_bytes()
    more = ["--cache_latents", "--max_train_steps", 2, "--resume_from_checkpoint"]
    with pytest.raises(UserError, match="holds another run"):
        lora(other, *more, one / "checkpoint-1")
    shutil.rmtree(other / "checkpoint-1")
    with pytest.raises(UserError, match="holds another run"):
        lora(other, *more, "latest")
    assert (other / LORA_FILE).read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(finished_lora, lora, tmp_path):
    more = ["--cache_latents", "--max_train_steps", 1]
    out = shutil.copytree(finished_lora(*more), tmp_path / "run")
    before = last_state(out, *RESULTS)
    lora(out, *more, "--resume_from_checkpoint", "latest")
    assert last_state(out, *RESULTS) == before
