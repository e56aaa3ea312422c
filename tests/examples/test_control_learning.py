"""Training the ControlNet and Control-LoRA demos on eight pairs fills their outlines.

benchmarks/learning.py draws held-out pairs.
"""

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT, load_script

from mindtune import rng
from mindtune.models import control_lora, execution, loading, lora, lora_files, precision, sampling

evaluator = load_script("examples/tiny/evaluate_shapes.py")
shapes = load_script("examples/tiny/shapes.py")
PIPELINE = ROOT / "examples/tiny/flux-shapes"
FULL = precision.resolve_precision("no")
# A green circle on white at four positions in two sizes: the caption is the same for all, only the outline tells which.
SCENES = [scene for scene in shapes.scenes("train") if scene.caption == "a green circle on a white background"]
FEWER = ["--train_batch_size", 8, "--learning_rate", 3e-3, "--lr_warmup_steps", 10]


@pytest.fixture
def pairs(tmp_path):
    """A folder whose subfolder train has the eight pairs."""
    assert len(SCENES) == 8
    shapes.write_scenes(tmp_path / "train", SCENES, 64)
    return tmp_path


@pytest.fixture(scope="module")
def outlines():
    """The latents of the outlines, [8, C, h, w]."""
    vae = loading.load_model(PIPELINE, "vae", FULL)
    with execution.pynative():
        latents = [sampling.encode_image(vae, shapes.render_outline(scene, 64), ms.float32) for scene in SCENES]
    return np.concatenate(latents)


def generate(monkeypatch, adapter=None, **inputs):
    """An image per pair, all at once, which is faster; `inputs` are those of the sampler."""
    sample = sampling.sample_latents
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_latents", lambda *args, **given: sample(*args, **{**given, **inputs}))
        return evaluator.generate(PIPELINE, [scene.caption for scene in SCENES], adapter=adapter)


def assert_shapes_follow_their_outlines(images):
    """Mean intersection over union with the circle of the outline, and with one of another position or size."""
    own, other = (
        np.mean([evaluator.overlap(images[k], shapes.render(SCENES[k - offset], 64)) for k in range(8)])
        for offset in (0, 3)
    )
    print("own outline", own, "another", other)
    assert own >= 0.75 and other <= 0.45


def test_shapes_of_a_controlnet_follow_the_outline(learning, pairs, outlines, monkeypatch):
    learning.train_controlnet(pairs, 120, *FEWER)
    controlnet = loading.load_model(pairs, "controlnet", FULL)
    noise = rng.normal(1, "noise", shape=outlines.shape)  # one of its own for each image
    assert_shapes_follow_their_outlines(generate(monkeypatch, noise=noise, control=(controlnet, outlines, 1.0)))


def test_shapes_of_a_control_lora_follow_the_outline(learning, pairs, outlines, monkeypatch):
    learning.train_control_lora(pairs, 100, *FEWER, "--learning_rate", 6e-3)
    load = lora.load_lora

    def widen_and_load(path, models, *more):
        control_lora.widen_input_layer(models["transformer"], control_lora.count_inputs(PIPELINE, fill=False))
        load(path, models, *more)

    monkeypatch.setattr(lora, "load_lora", widen_and_load)
    noise = rng.normal(1, "noise", shape=outlines.shape)
    adapter = pairs / "lora" / lora_files.LORA_FILE
    assert_shapes_follow_their_outlines(generate(monkeypatch, adapter, noise=noise, condition=[outlines]))
