"""The FLUX ControlNet script on two ranks is the same run as on one."""

import json

from msrun_job import assert_same_run

from mindtune.run.checkpoint import checkpoints

LAUNCH = "flux_controlnet/launch/train_devices.sh"


def test_two_ranks_are_one_with_twice_the_accumulation(job, control, control_flags, oblong, tmp_path):
    """With buckets, which may differ between ranks in one update. Rank 0 evaluates and samples images.

    The two are started by the launch script.
    """
    more = ["--aspect_ratio_buckets", "32,48;48,32", "--random_flip", "--cache_latents"]
    more += ["--use_ema", "--validation_split", 0.2, "--validation_steps", 2, "--validation_prompt", "x"]
    more += ["--num_validation_images", 1, "--validation_image", oblong / "conditioning/0.png"]
    more += ["--checkpointing_steps", 2, "--adam_epsilon", 1e-4]
    arguments = control_flags(tmp_path / "two", *more, "--mixed_precision", "no", "--gradient_accumulation_steps", 1)
    data = arguments.index("--train_data_dir")
    del arguments[data : data + 2]  # the launch script has DATA
    two = job(LAUNCH, 2, tmp_path / "two", arguments, DATA=str(oblong))
    control(tmp_path / "one", *more, "--train_data_dir", oblong, "--gradient_accumulation_steps", 2)
    assert two.wait() == 0, two.said()[-6000:]
    assert_same_run(tmp_path / "two", tmp_path / "one", 3)
    assert [folder.name for folder in checkpoints(tmp_path / "two")] == ["checkpoint-2", "checkpoint-3"]
    assert {path.name for path in (tmp_path / "two" / "samples").iterdir()} == {"step-000002.png", "final.png"}
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["workers"] == 2 and record["finished"] is True
