"""infer_flux_kontext.py: edited images, the same as those of validation in training."""

import json
import shlex

import numpy as np
import pytest
from conftest import load_script, run_here
from PIL import Image

from mindtune.cli import UserError
from mindtune.data import conditions, grids
from mindtune.encode import encoder_stage
from mindtune.models import loading

PROMPT = "make the shape red"


@pytest.fixture(scope="module")
def script():
    return load_script("examples/flux_kontext/infer_flux_kontext.py")


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """Four edits of the shapes world, 48 pixels square."""
    folder = tmp_path_factory.mktemp("edits") / "pairs"
    load_script("examples/tiny/shapes.py").make_edits(folder, 4, 48, seed=0, split="train")
    return folder


def source(edits, number):
    return edits / "sources" / f"{number:06d}.png"


@pytest.fixture(scope="module")
def trained(small_flux, edits, encoder_cache, tmp_path_factory):
    """A run of three updates at a high rate; validation of one prompt for two sources, and of a file.

    The file has an edit of another size, and a row without a source.
    """
    out = tmp_path_factory.mktemp("trained") / "run"
    rows = [
        {"prompt": PROMPT, "image": "sources/000001.png", "seed": 5, "width": 64, "height": 32, "guidance": 2.0},
        {"prompt": "a cat", "seed": 6, "width": 48, "height": 32, "steps": 3},
    ]
    file = edits / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--pretrained_model_name_or_path", small_flux, "--train_data_dir", edits, "--cache_dir", encoder_cache]
    flags += shlex.split("--image_column target --conditioning_image_column source --caption_column instruction")
    flags += shlex.split("--resolution 32 --max_sequence_length 16 --seed 0 --mindspore_mode 1 --report_to none")
    flags += shlex.split("--cache_latents --learning_rate 1e-2 --train_batch_size 2 --max_train_steps 3 --lora_alpha 8")
    flags += shlex.split("--num_validation_images 2 --num_inference_steps 2 --guidance_scale 3 --upcast_before_saving")
    flags += ["--validation_prompt", PROMPT, "--validation_image", source(edits, 0), source(edits, 1)]
    train = load_script("examples/flux_kontext/train_lora_flux_kontext.py")
    run_here(train, [*flags, "--output_dir", out, "--validation_file", file])
    return out


@pytest.fixture
def infer(script, small_flux, encoder_cache, tmp_path):
    """infer(*flags): runs the script in this process and returns the path of --output; later flags win."""

    def run(*more):
        base = ["--pretrained_model_name_or_path", small_flux, "--cache_dir", encoder_cache, "--prompt", PROMPT]
        base += shlex.split("--resolution 32 --num_inference_steps 2 --max_sequence_length 16 --guidance_scale 3")
        run_here(script, [*base, "--output", tmp_path / "x.png", *more])
        return tmp_path / "x.png"

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_training_and_inference_generate_the_same_images(infer, trained, edits, tmp_path):
    """For each source a row without and a row with the adapter, both of which start with the source."""
    two = "--image", source(edits, 0), source(edits, 1), "--num_images_per_prompt", 2
    grid = infer("--lora", trained, "--compare", *two)
    assert np.abs(pixels(grid) - pixels(trained / "samples" / "final.png")).max() <= 1
    singles = [Image.open(tmp_path / f"x-{n}.png") for n in range(1, 9)]
    assert {single.size for single in singles} == {(32, 32)} and len({single.tobytes() for single in singles}) == 8
    sources = [conditions.condition_image(source(edits, n), "--image", 32) for n in (0, 0, 1, 1)]
    rows = [[image, *singles[2 * n : 2 * n + 2]] for n, image in enumerate(sources)]
    labels = [f"{PROMPT} (base)", f"{PROMPT} (adapter)"] * 2
    np.testing.assert_array_equal(pixels(grid), np.asarray(grids.image_grid(rows, labels)))
    first, adapted, other = (pixels(tmp_path / f"x-{n}.png") for n in (1, 3, 5))
    assert np.abs(first - adapted).mean() > 0.5  # the adapter has an effect
    assert np.abs(first - other).mean() > 0.5  # and so has the source, with the same noise


def test_rows_of_a_file_are_the_images_of_inference_with_the_same_settings(infer, trained):
    """The edit gets the size that its source was fitted to; without a source the size is given."""
    final = trained / "samples" / "final"
    edited = infer(
        "--lora", trained, "--image", final / "row-01-condition.png", *shlex.split("--seed 5 --guidance_scale 2")
    )
    assert Image.open(edited).size == (64, 32)
    assert np.abs(pixels(edited) - pixels(final / "row-01.png")).max() <= 1
    words = "--prompt 'a cat' --seed 6 --height 32 --width 48 --num_inference_steps 3 --overwrite"
    drawn = infer("--lora", trained, *shlex.split(words))
    assert Image.open(drawn).size == (48, 32)
    assert np.abs(pixels(drawn) - pixels(final / "row-02.png")).max() <= 1


def test_scale_zero_is_the_base_and_a_larger_one_is_further_from_it(infer, trained, edits):
    image = "--image", source(edits, 0), "--overwrite"
    base = pixels(infer(*image))
    zero, half, whole = (pixels(infer("--lora", trained, "--lora_scale", scale, *image)) for scale in (0, 0.5, 1))
    np.testing.assert_array_equal(zero, base)
    assert 0 < np.abs(half - base).mean() < np.abs(whole - base).mean()


def test_an_edited_image_has_the_aspect_ratio_of_its_source(infer, tmp_path):
    """The shorter side is --resolution, the longer one the nearest multiple of 16: 60 x 90 becomes 32 x 48."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(tmp_path / "tall.png")
    assert Image.open(infer("--image", tmp_path / "tall.png")).size == (32, 48)


def test_without_a_source_images_are_square_by_default(infer):
    """And have the same bytes again."""
    first = infer().read_bytes()
    assert Image.open(infer("--overwrite")).size == (32, 32)
    assert infer("--overwrite").read_bytes() == first
    assert infer("--overwrite", "--seed", 1).read_bytes() != first


@pytest.mark.parametrize("precision", ["--mixed_precision=fp16", "--mixed_precision=bf16", "--base_precision=int8"])
def test_lower_precision_generates_nearly_the_same(infer, trained, edits, precision):
    image = "--image", source(edits, 0), "--lora", trained
    full = pixels(infer(*image))
    assert 0 < np.abs(pixels(infer(*image, precision, "--overwrite")) - full).mean() < 1


@pytest.mark.parametrize(
    "more, message",
    [
        (["--resolution", 40], "--resolution 40: must be divisible by 16"),
        (["--width", 40], "--width 40: must be divisible by 16"),
        (["--height", 32, "--image", "x.png"], "--height 32: an edited image has the shape of --image"),
        (["--image", "nowhere.png"], "--image nowhere.png: cannot be read as an image"),
        (["--prompt", "a", "b", "c", "--image", "x.png", "y.png"], "--prompt has 3 and --image 2"),
        (["--lora", "nowhere"], "--lora nowhere: no such file"),
        (["--compare"], "--compare needs --lora"),
        (["--num_images_per_prompt", 0], "--num_images_per_prompt 0: must be at least 1"),
        (["--max_sequence_length", 600], "--max_sequence_length 600: .*512"),
        (["--output", "x.jpg"], "--output x.jpg: .* are written as PNG"),
    ],
)
def test_bad_flags_are_refused(infer, more, message, monkeypatch):
    def too_early(*_):
        pytest.fail("a model was loaded before the flags were checked")

    monkeypatch.setattr(loading, "load_model", too_early)
    monkeypatch.setattr(encoder_stage, "run_in_child", too_early)
    with pytest.raises(UserError, match=message):
        infer(*more)
