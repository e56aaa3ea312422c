"""The Stable Diffusion ControlNet scripts with two real workers are the same runs as with one."""

from msrun_job import assert_same_run


def assert_two_are_one(job, alone, sd, flags, tmp_path, two, one):
    shared = job(sd.path, 2, tmp_path / "two", flags(sd, tmp_path / "two", *two))
    alone(sd.path, flags(sd, tmp_path / "one", *one))
    assert shared.wait() == 0, shared.said()[-6000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", 3)


def test_a_stream_is_shared_out(job, alone, sd15, sd_flags, tmp_path):
    more = [
        "--streaming",
        "--shuffle_buffer_size",
        3,
        "--random_flip",
        "--proportion_empty_prompts",
        0.3,
        "--adam_epsilon",
        1e-4,
    ]
    assert_two_are_one(job, alone, sd15, sd_flags, tmp_path, more, [*more, "--train_batch_size", 2])


def test_sdxl_with_shared_8_bit_moments(job, alone, sdxl, sd_flags, tmp_path):
    more = ["--use_8bit_adam", "--adam_epsilon", 1e-4]
    assert_two_are_one(
        job, alone, sdxl, sd_flags, tmp_path, [*more, "--zero_stage", 1], [*more, "--gradient_accumulation_steps", 2]
    )
