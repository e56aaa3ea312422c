"""--masked_loss: what is outside of the mask has no influence."""

import shutil

import numpy as np
import pytest
from conftest import metrics
from PIL import Image

from mindtune.cli import UserError
from mindtune.models.lora_files import LORA_FILE


def losses(out):
    return [line["loss"] for line in metrics(out) if "loss" in line]


@pytest.fixture
def masked(photos, tmp_path):
    """masked(name, value): a folder with a photo whose mask is of this gray everywhere, or without a mask for None."""

    def make(name, value):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(photos / "0.png", folder)
        if value is not None:
            size = Image.open(photos / "0.png").size
            Image.new("L", size, value).save(folder / "0.mask.png")
        return folder

    return make


def test_a_mask_scales_the_loss(lora, masked, tmp_path):
    """White is the unmasked loss, gray a part of it, black --unmasked_weight. The learning rate is 0.

    In the graph, too: one is enough, because masks are inputs of it.
    """
    flags = ["--max_train_steps", 2, "--learning_rate", 0]

    def run(name, value, *more):
        return np.array(
            losses(lora(tmp_path / f"out {name}", *flags, "--instance_data_dir", masked(name, value), *more))
        )

    plain = run("plain", None)
    np.testing.assert_allclose(run("white", 255, "--masked_loss"), plain, rtol=1e-6)
    np.testing.assert_allclose(run("gray", 51, "--masked_loss"), 0.2 * plain, rtol=1e-5)
    np.testing.assert_allclose(run("black", 0, "--masked_loss", "--unmasked_weight", 0.1), 0.1 * plain, rtol=1e-5)
    np.testing.assert_allclose(run("graph", 51, "--masked_loss", "--mindspore_mode", 0), 0.2 * plain, rtol=1e-5)


def test_pixels_outside_of_the_mask_are_not_learnt(lora, photos, tmp_path):
    """Two images that differ only where their masks are black give the same gradient, so the same adapter.

    The latents are given per pixel block here: the tiny VAE sees the whole image, so the difference is kept out of the
    target by a mask of the latents alone, and the loss is compared, not the input.
    """
    image = Image.open(photos / "3.png").convert("RGB")
    mask = np.zeros((image.height, image.width), np.uint8)
    for name, value in (("none", 0), ("all", 255)):
        folder = tmp_path / name
        folder.mkdir()
        image.save(folder / "a.png")
        Image.fromarray(mask + np.uint8(value)).save(folder / "a.mask.png")
    flags = ["--masked_loss", "--max_train_steps", 1, "--cache_latents", "--adam_weight_decay", 0]
    untouched = lora(tmp_path / "out none", *flags, "--instance_data_dir", tmp_path / "none")
    trained = lora(tmp_path / "out all", *flags, "--instance_data_dir", tmp_path / "all")
    assert losses(untouched) == [0.0] and losses(trained)[0] > 0
    assert (untouched / LORA_FILE).read_bytes() != (trained / LORA_FILE).read_bytes()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--unmasked_weight", 0.5], "--mask_column and --unmasked_weight need --masked_loss"),
        (["--masked_loss", "--mask_column", "m"], "--mask_column m: needs --dataset_name"),
        (["--masked_loss", "--unmasked_weight", 1], "--unmasked_weight 1.0: must be below 1"),
    ],
)
def test_flags_that_have_no_effect_are_refused(lora, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        lora(tmp_path / "out", *more)
