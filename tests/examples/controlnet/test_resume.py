"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

import pytest
from killed_runs import assert_resumes_exactly

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


def test_killed_and_resumed_equals_not_killed(sd, run, tmp_path, capfd):
    train = lambda out, *more: run(sd, out, *more)  # noqa: E731
    kills = 1 if sd.kind == "sdxl" else 2  # fp16 is slow on a CPU
    assert_resumes_exactly(train, CASES[sd.kind], tmp_path, (FINAL, "config.json", "metrics.jsonl"), capfd, kills)


def test_another_gamma_or_tokenizer_is_reported(sd15, sdxl, run, tmp_path, capfd):
    run(sd15, tmp_path, "--max_train_steps", 1)
    more = ["--snr_gamma", 5, "--tokenizer_name", sdxl.root / "tokenizer_2"]
    run(sd15, tmp_path, "--max_train_steps", 2, *more, "--resume_from_checkpoint", "latest")
    assert "resuming with other values of tokenizer_name, snr_gamma than the checkpoint" in capfd.readouterr().out
    with pytest.raises(Exception, match="holds another run"):
        run(sd15, tmp_path)
