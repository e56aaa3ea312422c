"""Training the ControlNet demo for fewer updates fills outlines. benchmarks/learning.py shuffles them, too."""

from conftest import load_script

learning = load_script("benchmarks/learning.py")
STEPS = 180


def test_generated_shapes_follow_the_outline(tmp_path):
    """Mean intersection over union with the outlined shape on held-out pairs, with and without the ControlNet."""
    learning.make_pairs(tmp_path)
    learning.train_controlnet(tmp_path, STEPS)
    overlap = learning.mean_overlap(tmp_path, "controlled", 1.0)
    assert overlap >= 0.58
    assert overlap >= learning.mean_overlap(tmp_path, "base", 0.0) + 0.25
