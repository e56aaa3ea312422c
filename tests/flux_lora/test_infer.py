"""The inference script: pictures from a trained adapter, the same as training drew them."""

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from mindtune.cli import UserError
from mindtune.data import grids


@pytest.fixture(scope="module")
def script():
    return load_script("flux_lora/infer_flux_lora.py")


@pytest.fixture
def draw(script, tiny_flux, encoder_cache, tmp_path):
    """draw(*flags): runs the script in this process; later flags win."""

    def run(*more):
        base = [
            "--pretrained_model_name_or_path",
            tiny_flux,
            "--cache_dir",
            encoder_cache,
            "--prompt",
            "a cat",
            "--height",
            32,
        ]
        base += ["--width", 48, "--num_inference_steps", 2, "--max_sequence_length", 16, "--output", tmp_path / "x.png"]
        script.main([str(word) for word in (*base, *more)])
        return tmp_path / "x.png"

    return run


@pytest.fixture(scope="module")
def trained(lora_script, tiny_flux, photos, encoder_cache, tmp_path_factory):
    """A run with CLIP trained at a high rate, alpha twice the rank, and its final picture grid of one prompt."""
    out = tmp_path_factory.mktemp("trained")
    flags = [
        "--pretrained_model_name_or_path",
        tiny_flux,
        "--instance_data_dir",
        photos,
        "--instance_prompt",
        "a cat",
        "--resolution",
        32,
    ]
    flags += [
        "--max_sequence_length",
        16,
        "--cache_dir",
        encoder_cache,
        "--output_dir",
        out,
        "--seed",
        0,
        "--mindspore_mode",
        1,
    ]
    flags += [
        "--cache_latents",
        "--train_text_encoder",
        "--learning_rate",
        1e-2,
        "--text_encoder_lr",
        1e-2,
        "--max_train_steps",
        5,
    ]
    flags += ["--lora_alpha", 8, "--upcast_before_saving", "--report_to", "none", "--train_batch_size", 2]
    flags += ["--validation_prompt", "a cat", "--num_validation_images", 1, "--num_inference_steps", 2]
    lora_script.main([str(flag) for flag in flags])
    return out


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_has_the_size_asked_for_and_the_same_bytes_again(draw):
    first = draw().read_bytes()
    assert Image.open(draw("--overwrite")).size == (48, 32)
    assert draw("--overwrite").read_bytes() == first
    assert draw("--overwrite", "--seed", 1).read_bytes() != first


def test_training_and_inference_draw_the_same_picture(draw, trained, tmp_path):
    """The final grid of training holds base above adapter; inference from the saved file gives both again."""
    draw("--lora", trained, "--compare", "--width", 32)
    base, adapter = (Image.open(tmp_path / f"x-{n}.png") for n in (1, 2))
    grid = grids.image_grid([[base], [adapter]], ["a cat (base)", "a cat (adapter)"])
    assert np.abs(np.asarray(grid).astype(int) - pixels(trained / "samples" / "final.png")).max() <= 1
    assert np.abs(np.asarray(base).astype(int) - np.asarray(adapter)).mean() > 1


def test_scale_zero_is_the_base(draw, trained):
    with_zero = pixels(draw("--lora", trained / "pytorch_lora_weights.safetensors", "--lora_scale", 0))
    np.testing.assert_array_equal(with_zero, pixels(draw("--overwrite")))


def test_several_prompts_make_single_pictures_and_a_grid(draw, tmp_path):
    grid = draw("--prompt", "a cat", "a dog", "--num_images_per_prompt", 2)
    singles = [pixels(tmp_path / f"x-{n}.png") for n in (1, 2, 3, 4)]
    assert len({single.tobytes() for single in singles}) == 4
    assert Image.open(grid).size[0] == 2 * 48 * 4


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_half_precision_draws_nearly_the_same(draw, trained, mixed_precision):
    full = pixels(draw("--lora", trained))
    assert (
        np.abs(pixels(draw("--lora", trained, "--mixed_precision", mixed_precision, "--overwrite")) - full).mean() < 1
    )


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--height", 40], "--height 40: must be divisible by 16"),
        (["--lora", "nowhere"], "--lora nowhere: no such file"),
        (["--compare"], "--compare needs --lora"),
        (["--output", "x.jpg"], "--output x.jpg: images are written as PNG"),
        (["--num_images_per_prompt", 0], "--num_images_per_prompt 0: must be at least 1"),
    ],
)
def test_bad_flags_get_a_sentence(draw, more, sentence):
    with pytest.raises(UserError, match=sentence):
        draw(*more)


def test_a_picture_that_is_there_is_not_replaced(draw, tmp_path):
    (tmp_path / "x.png").write_text("mine")
    with pytest.raises(UserError, match=r"x\.png: is already there"):
        draw()
    assert (tmp_path / "x.png").read_text() == "mine"
