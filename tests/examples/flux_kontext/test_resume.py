"""A run of the Kontext script that is killed and resumed ends with the same bytes as one that was left alone."""

import json
import shutil

import pytest
from killed_runs import assert_a_killed_process_resumes, assert_resumes_exactly

from mindtune.cli import UserError
from mindtune.models.lora_files import LORA_FILE

from .conftest import TRAIN

RESULTS = LORA_FILE, "metrics.jsonl"
CASES = {
    "cached latents, flips, average and cosine": [
        "--cache_latents", "--random_flip", "--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", 2,
        "--validation_split", 0.2, "--encode_window", 2,
    ],
    "crops, accumulation, bf16, empty captions": [
        "--resolution", 16, "--aspect_ratio_buckets", "16,32;32,16", "--gradient_accumulation_steps", 2,
        "--mixed_precision", "bf16", "--proportion_empty_prompts", 0.3, "--dataloader_num_workers", 2,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_not_killed(kontext, tmp_path, capfd, case):
    assert_resumes_exactly(kontext, CASES[case], tmp_path, RESULTS, capfd, kills=1 if "bf16" in case else 2)


def test_a_process_that_is_killed_and_resumed_equals_one_that_is_not(kontext, kontext_flags, tmp_path):
    assert_a_killed_process_resumes(TRAIN, kontext_flags, kontext, ["--cache_latents"], tmp_path, RESULTS)


def test_another_adapter_is_refused_and_other_sources_are_reported(kontext, finished_kontext, edits, tmp_path, capfd):
    out = shutil.copytree(finished_kontext("--cache_latents", "--max_train_steps", 1), tmp_path / "run")
    again = ["--cache_latents", "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match="has shape"):
        kontext(out, *again, "--lora_rank", 8)
    data = shutil.copytree(edits, tmp_path / "edits")
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    del lines[0]["conditioning_image_file_name"]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kontext(out, *again, "--train_data_dir", data)
    assert "resuming with other values of data than the checkpoint" in capfd.readouterr().out
