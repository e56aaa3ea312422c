"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

import random

import pytest
from killed_runs import kill_somewhere, last_state

from mindtune.run.checkpoint import checkpoints

from .conftest import FINAL

CASES = {
    "sd15": [
        "--cache_latents", "--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--random_flip",
        "--snr_gamma", 5, "--optimizer", "adafactor",
    ],
    "sdxl": [
        "--streaming", "--shuffle_buffer_size", 3, "--proportion_empty_prompts", 0.3, "--mixed_precision", "fp16",
        "--gradient_accumulation_steps", 2, "--use_8bit_adam",
    ],
}  # fmt: skip


def end_state(out):
    """What must be equal to the byte: the ControlNet, the last checkpoint and the logged values."""
    return last_state(out, FINAL, "config.json", "metrics.jsonl")


def test_killed_twice_and_resumed_equals_not_killed(sd, run, sd_flags, tmp_path, capfd):
    more = [*CASES[sd.kind], "--max_train_steps", 6, "--checkpointing_steps", 2]
    run(sd, tmp_path / "whole", *more)
    out, chance = tmp_path / "killed", random.Random()
    resumed = [*more, "--resume_from_checkpoint", "latest"]
    # The first kill may come before the first checkpoint; the run then starts over.
    kill_somewhere(sd.path, sd_flags(sd, out, *more), chance, after=(out / "metrics.jsonl").exists)
    count = len(checkpoints(out))
    kill_somewhere(sd.path, sd_flags(sd, out, *resumed), chance, after=lambda: len(checkpoints(out)) > count)
    capfd.readouterr()
    run(sd, out, *resumed)
    printed = capfd.readouterr().out
    assert "resuming from checkpoint-" in printed and "not its exact continuation" not in printed
    assert end_state(out) == end_state(tmp_path / "whole")


def test_another_gamma_or_tokenizer_is_reported(sd15, sdxl, run, tmp_path, capfd):
    run(sd15, tmp_path, "--max_train_steps", 1)
    more = ["--snr_gamma", 5, "--tokenizer_name", sdxl.root / "tokenizer_2"]
    run(sd15, tmp_path, "--max_train_steps", 2, *more, "--resume_from_checkpoint", "latest")
    assert "resuming with other values of tokenizer_name, snr_gamma than the checkpoint" in capfd.readouterr().out
    with pytest.raises(Exception, match="holds another run"):
        run(sd15, tmp_path)
