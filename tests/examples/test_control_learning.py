"""Training the ControlNet demo on eight pairs fills their outlines. benchmarks/learning.py draws held-out pairs."""

import mindspore as ms
import numpy as np
from conftest import ROOT, load_script

from mindtune import rng
from mindtune.models import execution, loading, precision, sampling

evaluator = load_script("examples/tiny/evaluate_shapes.py")
shapes = load_script("examples/tiny/shapes.py")
PIPELINE = ROOT / "examples/tiny/flux-shapes"
# A green circle on white at four positions in two sizes: the caption is the same for all, only the outline tells which.
SCENES = [scene for scene in shapes.scenes("train") if scene.caption == "a green circle on a white background"]
FEWER = ["--train_batch_size", 8, "--learning_rate", 3e-3, "--lr_warmup_steps", 10]


def test_generated_shapes_follow_the_outline(learning, tmp_path, monkeypatch):
    """Mean intersection over union with the circle of the outline, and with one of another position or size.

    Each image from a noise of its own, all generated at once in a fraction of the inference script's time.
    """
    assert len(SCENES) == 8
    shapes.write_scenes(tmp_path / "train", SCENES, 64)
    learning.train_controlnet(tmp_path, 120, *FEWER)
    full = precision.resolve_precision("no")
    vae, controlnet = (loading.load_model(*where, full) for where in ((PIPELINE, "vae"), (tmp_path, "controlnet")))
    outlines = [shapes.render_outline(scene, 64) for scene in SCENES]
    with execution.pynative():
        latents = np.concatenate([sampling.encode_image(vae, outline, ms.float32) for outline in outlines])
    more = {"noise": rng.normal(1, "noise", shape=latents.shape), "control": (controlnet, latents, 1.0)}
    sample = sampling.sample_latents
    monkeypatch.setattr(sampling, "sample_latents", lambda *args, **given: sample(*args, **{**given, **more}))
    images = evaluator.generate(PIPELINE, [scene.caption for scene in SCENES])
    own, other = (
        np.mean([evaluator.overlap(images[k], shapes.render(SCENES[k - offset], 64)) for k in range(8)])
        for offset in (0, 3)
    )
    print("own outline", own, "another", other)
    assert own >= 0.75 and other <= 0.45
