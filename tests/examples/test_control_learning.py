"""Training the ControlNet demo for fewer updates fills outlines. benchmarks/learning.py shuffles them, too."""

import numpy as np
from conftest import ROOT, load_script
from PIL import Image

learning = load_script("benchmarks/learning.py")
demo = load_script("examples/demo_flux_controlnet.py")
evaluator = load_script("examples/tiny/evaluate_shapes.py")
UPDATES = 250


def test_generated_shapes_follow_the_outline(tmp_path):
    """Mean intersection over union with the outlined shape on held-out pairs, with and without the ControlNet."""
    learning.make_pairs(tmp_path)
    learning.train_controlnet(tmp_path, UPDATES)
    _, targets, prompts = demo.held_out(tmp_path)
    images = evaluator.generate(ROOT / "examples/tiny/flux-shapes", prompts)
    base = np.mean([evaluator.overlap(image, Image.open(target)) for image, target in zip(images, targets)])
    controlled = learning.mean_overlap(tmp_path, "controlled", 1.0)
    assert controlled >= 0.58 and controlled >= base + 0.25
