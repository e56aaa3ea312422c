"""Training Kontext on eight edits moves their colours to where the source has its shape. benchmarks/learning.py edits
sources that were not trained on.
"""

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, load_script
from safetensors.numpy import load_file

from mindtune import rng
from mindtune.models import execution, loading, lora_files, precision, sampling

evaluator = load_script("examples/tiny/evaluate_shapes.py")
shapes = load_script("examples/tiny/shapes.py")
PIPELINE = ROOT / "examples/tiny/flux-shapes"
INSTRUCTION = "make the shape green"
# A blue circle on white at four positions in two sizes: only the source tells which.
SCENES = [scene for scene in shapes.scenes("train") if scene.caption == "a blue circle on a white background"]
EDITS = [shapes.Edit(scene, INSTRUCTION, scene._replace(colour="green")) for scene in SCENES]
FEWER = ["--train_batch_size", 8, "--learning_rate", 6e-3, "--lr_warmup_steps", 10]


def edited(monkeypatch, adapter):
    """The images that the adapter makes of the sources, each from a noise of its own."""
    vae = loading.load_model(PIPELINE, "vae", precision.resolve_precision("no"))
    with execution.pynative():
        sources = [sampling.encode_image(vae, shapes.render(scene, 64), ms.float32) for scene in SCENES]
    more = {"source": np.concatenate(sources), "noise": rng.normal(1, "noise", shape=(8, *sources[0].shape[1:]))}
    sample = sampling.sample_latents
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_latents", lambda *args, **given: sample(*args, **{**given, **more}))
        return evaluator.generate(PIPELINE, [INSTRUCTION] * 8, tokens=16, adapter=adapter)


@pytest.fixture
def train(learning, tmp_path):
    shapes.write_edits(tmp_path / "train", EDITS, 64)

    def run(updates, *flags):
        learning.train_kontext(tmp_path, updates, *FEWER, *flags)
        return tmp_path / "lora" / lora_files.LORA_FILE

    return run


def test_edited_shapes_are_where_the_source_has_them(train, monkeypatch):
    """Mean intersection over union with the circle of the source, and with one of another position or size."""
    images = edited(monkeypatch, train(120))
    assert all(evaluator.recognize(image).colour == "green" for image in images)
    own, other = (
        np.mean([evaluator.overlap(images[k], shapes.render(SCENES[k - offset], 64)) for k in range(8)])
        for offset in (0, 3)
    )
    print("own source", own, "another", other)
    assert own >= 0.75 and other <= 0.45


def test_with_learning_rate_0_nothing_is_learnt(train):
    tensors = load_file(train(2, "--learning_rate", 0))
    changes = [value for name, value in tensors.items() if ".lora_B." in name]
    assert changes and not any(map(np.any, changes))
