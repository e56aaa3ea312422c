"""A run of the Control-LoRA script that is killed and resumed ends with the same bytes as one that was left alone."""

import shutil

import pytest
from killed_runs import assert_resumes_exactly

from mindtune.cli import UserError
from mindtune.models.lora_files import LORA_FILE

RESULTS = LORA_FILE, "metrics.jsonl"
CASES = {
    "norms, average, windows": [
        "--cache_latents", "--random_flip", "--train_norm_layers", "--use_ema", "--encode_window", 2,
        "--validation_split", 0.2, "--lr_scheduler", "cosine",
    ],
    "fill, random masks, accumulation, bf16": [
        "--fill", "--gradient_accumulation_steps", 2, "--mixed_precision", "bf16", "--dataloader_num_workers", 2,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_not_killed(control_lora, masked, tmp_path, capfd, case):
    more = [*CASES[case], *(["--train_data_dir", masked] if "fill" in case else [])]
    assert_resumes_exactly(control_lora, more, tmp_path, RESULTS, capfd, kills=1 if "bf16" in case else 2)


def test_norms_that_the_checkpoint_lacks_are_refused(control_lora, finished_control_lora, tmp_path):
    out = shutil.copytree(finished_control_lora("--cache_latents", "--max_train_steps", 1), tmp_path / "run")
    again = ["--cache_latents", "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=r"norm_\w+\.weight: the checkpoint has no such state"):
        control_lora(out, *again, "--train_norm_layers")
