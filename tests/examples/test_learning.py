"""Training the LoRA demo for fewer updates teaches the subject. benchmarks/learning.py trains more settings."""

import numpy as np
from conftest import ROOT, load_script

from mindtune.models.lora_files import LORA_FILE

evaluator = load_script("examples/tiny/evaluate_shapes.py")
shapes = load_script("examples/tiny/shapes.py")
PIPELINE = ROOT / "examples/tiny/flux-shapes"
UPDATES = 150


def test_the_base_model_generates_held_out_pairs():
    """Of 50 held-out captions; README.md of the pipeline has the scores of 200."""
    rng = np.random.default_rng(1)
    captions = [shapes.sample_scene(rng, "held_out").caption for _ in range(50)]
    scores = evaluator.score(evaluator.generate(PIPELINE, captions, seed=1), captions)
    assert scores["both_colours"] >= 0.85 and scores["shape"] >= 0.7


def test_the_adapter_generates_the_subject_and_the_base_model_does_not(learning, tmp_path):
    prompts = learning.SUBJECT_PROMPTS * 3
    adapter = learning.train_lora(tmp_path, "lora", "--max_train_steps", UPDATES) / LORA_FILE
    assert learning.subject_rate(evaluator.generate(PIPELINE, prompts)) <= 0.1
    assert learning.subject_rate(evaluator.generate(PIPELINE, prompts, adapter=adapter)) >= 0.8
