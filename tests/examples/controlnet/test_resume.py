"""A run that is killed and resumed ends with the same bytes as one that was left alone."""

import random
import signal
import time

import pytest

from mindtune.run.checkpoint import checkpoints

from .conftest import FINAL, start

CASES = {
    "sd15": ["--cache_latents", "--use_ema", "--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--random_flip", "--snr_gamma", 5,
             "--optimizer", "adafactor"],
    "sdxl": ["--streaming", "--shuffle_buffer_size", 3, "--proportion_empty_prompts", 0.3, "--mixed_precision", "fp16",
             "--gradient_accumulation_steps", 2, "--use_8bit_adam"],
}  # fmt: skip


def kill_somewhere(sd, arguments, out, chance, after):
    """Starts a run and ends it by SIGKILL up to a second after `after()` is true: within a step, a save, or a log line."""
    with open(out.parent / "killed.log", "w") as log:
        process = start(sd, arguments, log)
        while not after() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()


def end_state(out):
    """What must be the same to the byte: the ControlNet, the optimizer with everything around it, and the logged losses."""
    last = checkpoints(out)[-1]
    files = [
        out / FINAL,
        out / "config.json",
        out / "metrics.jsonl",
        *(path for path in last.rglob("*") if path.is_file()),
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_killed_twice_and_resumed_equals_left_alone(sd, run, sd_flags, tmp_path, capsys):
    more = [*CASES[sd.kind], "--max_train_steps", 6, "--checkpointing_steps", 2]
    run(sd, tmp_path / "whole", *more)
    out, chance = tmp_path / "killed", random.Random()
    resumed = [*more, "--resume_from_checkpoint", "latest"]
    # The first kill may come before the first checkpoint; the run then starts over.
    kill_somewhere(sd, sd_flags(sd, out, *more), out, chance, after=(out / "metrics.jsonl").exists)
    had = len(checkpoints(out))
    kill_somewhere(sd, sd_flags(sd, out, *resumed), out, chance, after=lambda: len(checkpoints(out)) > had)
    capsys.readouterr()
    run(sd, out, *resumed)
    said = capsys.readouterr().out
    assert "resuming from checkpoint-" in said and "not its exact continuation" not in said
    assert end_state(out) == end_state(tmp_path / "whole")


def test_another_gamma_or_tokenizer_is_said(sd15, sdxl, run, tmp_path, capsys):
    run(sd15, tmp_path, "--max_train_steps", 1)
    more = ["--snr_gamma", 5, "--tokenizer_name", sdxl.root / "tokenizer_2"]
    run(sd15, tmp_path, "--max_train_steps", 2, *more, "--resume_from_checkpoint", "latest")
    assert (
        "resuming with another tokenizer_name, snr_gamma than the checkpoint was made with" in capsys.readouterr().out
    )
    with pytest.raises(Exception, match="holds another run"):
        run(sd15, tmp_path)
