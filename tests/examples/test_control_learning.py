"""Training the ControlNet demo for fewer updates fills outlines. benchmarks/learning.py shuffles them, too."""

import mindspore as ms
import numpy as np
from conftest import ROOT, load_script
from PIL import Image

from mindtune import rng
from mindtune.models import execution, loading, precision, sampling

learning = load_script("benchmarks/learning.py")
demo = load_script("examples/demo_flux_controlnet.py")
evaluator = load_script("examples/tiny/evaluate_shapes.py")
PIPELINE = ROOT / "examples/tiny/flux-shapes"
UPDATES = 250


def test_generated_shapes_follow_the_outline(tmp_path, monkeypatch):
    """Mean intersection over union with the outlined shape on held-out pairs, with and without the ControlNet.

    The images with it are those of the inference script, generated at once in a fraction of the time: all from the
    noise of its first image.
    """
    learning.make_pairs(tmp_path)
    learning.train_controlnet(tmp_path, UPDATES)
    outlines, targets, prompts = demo.held_out(tmp_path)

    def overlap():
        images = evaluator.generate(PIPELINE, prompts)
        return np.mean([evaluator.overlap(image, Image.open(target)) for image, target in zip(images, targets)])

    base = overlap()
    full = precision.resolve_precision("no")
    vae, controlnet = (loading.load_model(*where, full) for where in ((PIPELINE, "vae"), (tmp_path, "controlnet")))
    with execution.pynative():
        latents = [sampling.encode_image(vae, Image.open(path).convert("RGB"), ms.float32) for path in outlines]
    control = controlnet, np.concatenate(latents), 1.0
    noise = np.repeat(rng.normal(0, "validation", 0, shape=latents[0].shape), len(outlines), axis=0)
    sample = sampling.sample_latents
    monkeypatch.setattr(
        sampling, "sample_latents", lambda *args, **more: sample(*args, **{**more, "noise": noise, "control": control})
    )
    controlled = overlap()
    assert controlled >= 0.58 and controlled >= base + 0.25
