"""infer_flux_lora.py: images from a trained adapter, the same as those of validation in training."""

import json
import shlex

import numpy as np
import pytest
from conftest import load_script, run_here
from PIL import Image

from mindtune.cli import UserError
from mindtune.data import grids

FILE = [{"prompt": "a dog", "seed": 5, "width": 48, "height": 32, "steps": 3, "guidance": 2.0}, {"prompt": "a cat"}]


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
    """A run with CLIP trained at a high rate and alpha twice the rank; validation of one prompt and of FILE."""
    out = tmp_path_factory.mktemp("trained")
    file = tmp_path_factory.mktemp("file") / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in FILE))
    flags = ["--pretrained_model_name_or_path", tiny_flux, "--instance_data_dir", photos, "--instance_prompt", "a cat"]
    flags += ["--cache_dir", encoder_cache, "--output_dir", out, "--validation_prompt", "a cat"]
    flags += shlex.split("--resolution 32 --max_sequence_length 16 --seed 0 --mindspore_mode 1 --cache_latents")
    flags += shlex.split("--train_text_encoder --learning_rate 1e-2 --text_encoder_lr 1e-2 --max_train_steps 5")
    flags += shlex.split("--lora_alpha 8 --upcast_before_saving --report_to none --train_batch_size 2")
    flags += shlex.split("--num_validation_images 1 --num_inference_steps 2 --validation_epochs 1")
    run_here(lora_script, [*flags, "--validation_file", file])
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


def test_rows_of_a_file_are_the_images_of_inference_with_the_same_settings(infer, trained, tmp_path):
    words = "--prompt 'a dog' --seed 5 --width 48 --height 32 --num_inference_steps 3 --guidance_scale 2 --compare"
    infer("--lora", trained, *shlex.split(words))
    final = trained / "samples" / "final"
    for name, number in (("row-01-base", 1), ("row-01", 2)):
        single = Image.open(tmp_path / f"x-{number}.png")
        assert single.size == (48, 32)
        assert np.abs(pixels(final / f"{name}.png") - np.asarray(single)).max() <= 1, name
    # The second row has the flags' values: it is the first image of --validation_prompt, in the grid's lower half.
    grid = Image.open(trained / "samples" / "final.png")
    cell = grid.crop((0, grid.height - 192, 192, grid.height)).resize((32, 32), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(cell), pixels(final / "row-02.png"))


def test_rows_of_a_file_are_drawn_at_every_validation_from_the_same_noise(trained):
    folders = sorted((trained / "samples").glob("step-*/"))
    assert folders and not list(folders[0].glob("*base*"))
    first, last = (pixels(folder / "row-01.png") for folder in (folders[0], trained / "samples" / "final"))
    assert 0 < np.abs(first - last).mean() < 64  # two random images differ by 85


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
