"""infer_flux_lora.py: images from a trained adapter, the same as those of validation in training."""

import shlex

import numpy as np
import pytest
from conftest import load_script, run_here
from PIL import Image

from mindtune.cli import UserError
from mindtune.data import grids


@pytest.fixture(scope="module")
def script():
    return load_script("flux_lora/infer_flux_lora.py")


@pytest.fixture
def infer(script, tiny_flux, encoder_cache, tmp_path):
    """infer(*flags): runs the script in this process and returns the path of --output; later flags win."""

    def run(*more):
        base = ["--pretrained_model_name_or_path", tiny_flux, "--cache_dir", encoder_cache, "--prompt", "a cat"]
        base += shlex.split("--height 32 --width 48 --num_inference_steps 2 --max_sequence_length 16")
        base += ["--output", tmp_path / "x.png"]
        run_here(script, [*base, *more])
        return tmp_path / "x.png"

    return run


@pytest.fixture(scope="module")
def trained(lora_script, tiny_flux, photos, encoder_cache, tmp_path_factory):
    """A run with CLIP trained at a high rate, alpha twice the rank, and its final validation grid of one prompt."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--pretrained_model_name_or_path", tiny_flux, "--instance_data_dir", photos, "--instance_prompt", "a cat"]
    flags += ["--cache_dir", encoder_cache, "--output_dir", out, "--validation_prompt", "a cat"]
    flags += shlex.split("--resolution 32 --max_sequence_length 16 --seed 0 --mindspore_mode 1 --cache_latents")
    flags += shlex.split("--train_text_encoder --learning_rate 1e-2 --text_encoder_lr 1e-2 --max_train_steps 5")
    flags += shlex.split("--lora_alpha 8 --upcast_before_saving --report_to none --train_batch_size 2")
    flags += shlex.split("--num_validation_images 1 --num_inference_steps 2")
    run_here(lora_script, flags)
    return out


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_an_image_has_the_requested_size_and_the_same_bytes_again(infer):
    first = infer().read_bytes()
    assert Image.open(infer("--overwrite")).size == (48, 32)
    assert infer("--overwrite").read_bytes() == first
    assert infer("--overwrite", "--seed", 1).read_bytes() != first


def test_training_and_inference_generate_the_same_image(infer, trained, tmp_path):
    """The final grid of training has the base above the adapter; inference from the saved file generates both again."""
    infer("--lora", trained, "--compare", "--width", 32)
    base, adapter = (Image.open(tmp_path / f"x-{n}.png") for n in (1, 2))
    grid = grids.image_grid([[base], [adapter]], ["a cat (base)", "a cat (adapter)"])
    assert np.abs(np.asarray(grid).astype(int) - pixels(trained / "samples" / "final.png")).max() <= 1
    assert np.abs(np.asarray(base).astype(int) - np.asarray(adapter)).mean() > 1


def test_scale_zero_is_the_base(infer, trained):
    with_zero = pixels(infer("--lora", trained / "pytorch_lora_weights.safetensors", "--lora_scale", 0))
    np.testing.assert_array_equal(with_zero, pixels(infer("--overwrite")))


def test_several_prompts_make_single_images_and_a_grid(infer, tmp_path):
    grid = infer("--prompt", "a cat", "a dog", "--num_images_per_prompt", 2)
    singles = [pixels(tmp_path / f"x-{n}.png") for n in (1, 2, 3, 4)]
    assert len({single.tobytes() for single in singles}) == 4
    assert Image.open(grid).size[0] == 2 * 48 * 4


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_half_precision_generates_nearly_the_same(infer, trained, mixed_precision):
    full = pixels(infer("--lora", trained))
    half = pixels(infer("--lora", trained, "--mixed_precision", mixed_precision, "--overwrite"))
    assert np.abs(half - full).mean() < 1


@pytest.mark.parametrize(
    "more, message",
    [
        (["--height", 40], "--height 40: must be divisible by 16"),
        (["--lora", "nowhere"], "--lora nowhere: no such file"),
        (["--compare"], "--compare needs --lora"),
        (["--output", "x.jpg"], "--output x.jpg: .* are written as PNG"),
        (["--num_images_per_prompt", 0], "--num_images_per_prompt 0: must be at least 1"),
    ],
)
def test_bad_flags_are_refused(infer, more, message):
    with pytest.raises(UserError, match=message):
        infer(*more)


def test_an_existing_image_is_not_replaced(infer, tmp_path):
    (tmp_path / "x.png").write_text("existing")
    with pytest.raises(UserError, match=r"x\.png: is already there"):
        infer()
    assert (tmp_path / "x.png").read_text() == "existing"
