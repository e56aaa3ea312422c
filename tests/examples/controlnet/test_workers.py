"""The Stable Diffusion ControlNet scripts on two ranks are the same runs as on one."""

from msrun_job import assert_same_run


def assert_two_are_one(job, run, sd, flags, tmp_path, two, one):
    ranks = job(sd.path, 2, tmp_path / "two", flags(sd, tmp_path / "two", *two))
    run(sd, tmp_path / "one", *one)
    assert ranks.wait() == 0, ranks.said()[-6000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", 3)


def test_ranks_take_shards_of_a_stream(job, run, sd15, sd_flags, tmp_path):
    more = ["--streaming", "--shuffle_buffer_size", 3, "--random_flip"]
    more += ["--proportion_empty_prompts", 0.3, "--adam_epsilon", 1e-4]
    assert_two_are_one(job, run, sd15, sd_flags, tmp_path, more, [*more, "--train_batch_size", 2])


def test_sdxl_with_sharded_8_bit_moments(job, run, sdxl, sd_flags, tmp_path):
    more = ["--use_8bit_adam", "--adam_epsilon", 1e-4]
    two, one = [*more, "--zero_stage", 1], [*more, "--gradient_accumulation_steps", 2]
    assert_two_are_one(job, run, sdxl, sd_flags, tmp_path, two, one)
