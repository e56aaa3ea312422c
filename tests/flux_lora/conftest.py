"""The LoRA script's batches without encoders."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import StageWithoutEncoders

from mindtune.data.buckets import bucket_ids, covering
from mindtune.data.image_data import ClassImages, ImageData
from mindtune.data.image_facts import ImageFacts

VAE_CONFIG = {"latent_channels": 16, "block_out_channels": [1, 1, 1, 1]}


@pytest.fixture
def batches(lora_script, flags, tmp_path):
    """batches(sizes, *flags): `at(k)`, the arrays of batch k, and the `data` of a run.

    With `class_images` the instance images are the class images, too. `moments` stands in for cached latents.
    """

    def make(sizes, *more, class_images=False, moments=None):
        args = lora_script.parse_args(flags(tmp_path / "out", *more))
        samples = lora_script.load_samples(args, covering(sizes), ImageFacts())
        ids = bucket_ids([sample.size for sample in samples], sizes)
        data = ImageData(
            samples,
            ids,
            ClassImages(samples, ids) if class_images else ClassImages([], np.array([], int)),
            sizes=sizes,
            seed=0,
            batch_size=args.train_batch_size,
            repeats=args.repeats,
        )
        made = lora_script.Batches(args, StageWithoutEncoders(moments), VAE_CONFIG, sizes, 1000)
        return SimpleNamespace(data=data, at=lambda number: made.make(data.uses(number)))

    return make
