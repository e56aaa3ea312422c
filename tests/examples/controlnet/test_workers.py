"""A Stable Diffusion ControlNet script on two ranks is the same run as on one."""

from msrun_job import assert_same_run


def test_two_ranks_are_one_with_twice_the_accumulation(job, run, sdxl, sd_flags, tmp_path):
    """Shards of a stream, and sharded 8-bit moments. Both scripts take their ranks from the same functions."""
    more = ["--streaming", "--shuffle_buffer_size", 3, "--random_flip", "--proportion_empty_prompts", 0.3]
    more += ["--use_8bit_adam", "--adam_epsilon", 1e-4]
    two = job(sdxl.path, 2, tmp_path / "two", sd_flags(sdxl, tmp_path / "two", *more, "--zero_stage", 1))
    run(sdxl, tmp_path / "one", *more, "--gradient_accumulation_steps", 2)
    assert two.wait() == 0, two.said()[-6000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", 3)
