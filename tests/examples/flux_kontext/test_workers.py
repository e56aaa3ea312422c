"""The Kontext script on two ranks is the same run as on one. Control-LoRA takes its ranks from the same functions."""

from msrun_job import assert_same_run

TRAIN = "examples/flux_kontext/train_lora_flux_kontext.py"


def test_two_ranks_are_one_with_twice_the_accumulation(job, kontext, kontext_flags, tmp_path):
    """With sources of two sizes and pairs without one, so that the ranks have other shapes in one update."""
    more = ["--random_flip", "--cache_latents", "--adam_epsilon", 1e-4]
    two = job(TRAIN, 2, tmp_path / "two", kontext_flags(tmp_path / "two", *more, "--zero_stage", 1))
    kontext(tmp_path / "one", *more, "--gradient_accumulation_steps", 2)
    assert two.wait() == 0, two.said()[-6000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", 3)
