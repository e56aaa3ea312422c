"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

from functools import partial

import pytest
from killed_runs import assert_a_killed_process_resumes, assert_resumes_exactly, start

from .conftest import FINAL

# What must be equal to the byte, besides the last checkpoint: the ControlNet and the logged values.
RESULTS = FINAL, "config.json", "metrics.jsonl"

CASES = {
    "sd15": [
        "--cache_latents", "--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--random_flip",
        "--snr_gamma", 5, "--optimizer", "adafactor",
    ],
    "sdxl": [
        "--streaming", "--shuffle_buffer_size", 3, "--proportion_empty_prompts", 0.3, "--mixed_precision", "bf16",
        "--gradient_accumulation_steps", 2, "--use_8bit_adam", "--cache_latents", "--encode_window", 1,
    ],
}  # fmt: skip


def test_killed_and_resumed_equals_not_killed(sd, run, tmp_path, capfd):
    assert_resumes_exactly(partial(run, sd), CASES[sd.kind], tmp_path, RESULTS, capfd)


def test_a_process_that_is_killed_and_resumed_equals_one_that_is_not(sd15, run, sd_flags, tmp_path):
    """In windows of one update, whose entries are removed before the next one is encoded."""
    make_flags, train = partial(sd_flags, sd15), partial(run, sd15)
    more = ["--cache_latents", "--encode_window", 1, "--cache_limit_gb", 1e-9, "--cache_dir", tmp_path / "cache"]
    assert_a_killed_process_resumes(sd15.path, make_flags, train, more, tmp_path, RESULTS)


def test_two_runs_on_the_same_cache_at_the_same_time(sd15, run, sd_flags, tmp_path):
    """Each removes entries that the other one may still need; both end as a run that is alone."""
    more = ["--cache_latents", "--streaming", "--shuffle_buffer_size", 3, "--max_train_steps", 8]
    more += ["--encode_window", 1, "--cache_limit_gb", 1e-9, "--cache_dir"]
    names = ("one", "other")
    with open(tmp_path / "log", "w") as log:
        runs = [start(sd15.path, sd_flags(sd15, tmp_path / name, *more, tmp_path / "cache"), log) for name in names]
        assert [process.wait() for process in runs] == [0, 0], (tmp_path / "log").read_text()
    run(sd15, tmp_path / "alone", *more, tmp_path / "another cache")
    weights = [(tmp_path / name / FINAL).read_bytes() for name in (*names, "alone")]
    assert weights[0] == weights[1] == weights[2]


def test_another_gamma_or_tokenizer_is_reported(sd15, sdxl, run, tmp_path, capfd):
    run(sd15, tmp_path, "--max_train_steps", 1)
    more = ["--snr_gamma", 5, "--tokenizer_name", sdxl.root / "tokenizer_2"]
    run(sd15, tmp_path, "--max_train_steps", 2, *more, "--resume_from_checkpoint", "latest")
    assert "resuming with other values of tokenizer_name, snr_gamma than the checkpoint" in capfd.readouterr().out
    with pytest.raises(Exception, match="holds another run"):
        run(sd15, tmp_path)
