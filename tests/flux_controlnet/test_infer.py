"""infer_flux_controlnet.py: images that follow a condition, the same as those of validation in training."""

import json
import shlex

import mindspore as ms
import numpy as np
import pytest
from conftest import load_script, run_here
from PIL import Image

from mindtune import rng
from mindtune.cli import UserError
from mindtune.data import conditions, grids, image_sample
from mindtune.encode import encoder_stage
from mindtune.models import configs, controlnets, loading, named_parameters, precision, sampling


@pytest.fixture(scope="module")
def script():
    return load_script("flux_controlnet/infer_flux_controlnet.py")


def outline(shapes, number):
    return shapes / "conditioning" / f"{number:06d}.png"


@pytest.fixture(scope="module")
def trained(control_script, small_flux, shapes, warm_cache, tmp_path_factory):
    """A run of three updates from a ControlNet whose projections are not zero, so that the condition has an effect."""
    out = tmp_path_factory.mktemp("trained") / "run"
    controlnet = controlnets.flux_controlnet(small_flux, 1, 1)
    for name, parameter in named_parameters.model_parameters(controlnet).items():
        if name.startswith("controlnet_"):
            parameter.set_data(ms.Tensor(0.2 * rng.normal(0, name, shape=parameter.shape)))
    loading.save_model(controlnet, out.parent / "initial", ms.float32)
    flags = ["--pretrained_model_name_or_path", small_flux, "--train_data_dir", shapes, "--cache_dir", warm_cache]
    flags += ["--output_dir", out, "--controlnet_model_name_or_path", out.parent / "initial"]
    flags += shlex.split(
        "--resolution 32 --max_sequence_length 16 --seed 0 --mindspore_mode 1 --report_to none --use_ema"
    )
    flags += shlex.split("--use_ema --cache_latents --learning_rate 1e-2 --train_batch_size 2 --max_train_steps 3")
    flags += shlex.split("--num_validation_images 2 --num_inference_steps 2 --controlnet_conditioning_scale 0.7")
    flags += ["--validation_prompt", "a red circle", "--validation_image", outline(shapes, 0), outline(shapes, 1)]
    line = {"prompt": "a blue star", "seed": 5, "width": 64, "height": 32, "steps": 3, "guidance": 2.0, "scale": 0.3}
    file = shapes.parent / "rows.jsonl"
    file.write_text(json.dumps({**line, "image": f"{shapes.name}/conditioning/000001.png"}))
    run_here(control_script, [*flags, "--validation_file", file])
    return out


@pytest.fixture
def infer(script, small_flux, shapes, warm_cache, trained, tmp_path):
    """infer(*flags): runs the script in this process and returns the path of --output; later flags win."""

    def run(*more):
        base = ["--pretrained_model_name_or_path", small_flux, "--cache_dir", warm_cache, "--controlnet", trained]
        base += ["--prompt", "a red circle", "--control_image", outline(shapes, 0), "--output", tmp_path / "x.png"]
        base += shlex.split("--resolution 32 --num_inference_steps 2 --max_sequence_length 16")
        run_here(script, [*base, *more])
        return tmp_path / "x.png"

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_one_image_is_saved_as_output_and_has_the_same_bytes_again(infer):
    first = infer().read_bytes()
    assert Image.open(infer("--overwrite")).size == (32, 32)
    assert infer("--overwrite").read_bytes() == first
    assert infer("--overwrite", "--seed", 1).read_bytes() != first


def test_training_and_inference_generate_the_same_images(infer, trained, shapes, tmp_path):
    """Validation samples with the averaged weights that are saved. A row of the grid starts with its condition."""
    both = ["--control_image", outline(shapes, 0), outline(shapes, 1)]
    grid = infer(*both, "--num_images_per_prompt", 2, "--controlnet_conditioning_scale", 0.7)
    assert np.abs(pixels(grid) - pixels(trained / "samples" / "final.png")).max() <= 1
    singles = [Image.open(tmp_path / f"x-{n}.png") for n in (1, 2, 3, 4)]
    assert {single.size for single in singles} == {(32, 32)} and len({single.tobytes() for single in singles}) == 4
    first, second = (conditions.condition_image(outline(shapes, n), "--control_image", 32) for n in (0, 1))
    rows = [[first, *singles[:2]], [second, *singles[2:]]]
    np.testing.assert_array_equal(pixels(grid), np.asarray(grids.image_grid(rows, ["a red circle"] * 2)))
    # The same noise with another condition gives another image.
    assert np.abs(pixels(tmp_path / "x-1.png") - pixels(tmp_path / "x-3.png")).mean() > 0.1


def test_a_row_of_a_file_is_the_image_of_inference_with_the_same_settings(infer, trained):
    """Inference takes the size from its condition, so it gets the one that the row was fitted to."""
    words = "--prompt 'a blue star' --seed 5 --num_inference_steps 3 --guidance_scale 2"
    folder = trained / "samples" / "final"
    more = ["--controlnet_conditioning_scale", 0.3, "--control_image", folder / "row-01-condition.png"]
    image = infer(*shlex.split(words), *more)
    assert Image.open(image).size == (64, 32)
    assert np.abs(pixels(image) - pixels(folder / "row-01.png")).max() <= 1


def test_scale_zero_is_the_base_model_and_a_larger_one_is_further_from_it(infer, small_flux, warm_cache):
    full = precision.resolve_precision("no")
    transformer, vae = (loading.load_model(small_flux, part, full) for part in ("transformer", "vae"))
    text = encoder_stage.EncoderStage(small_flux, None, "no", warm_cache / "mindtune", 16).text("a red circle")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    latents = sampling.sample_latents(
        transformer,
        configs.read_config(small_flux, "scheduler"),
        prompt_embeds=text["prompt_embeds"][None],
        pooled_prompt_embeds=text["pooled_prompt_embeds"][None],
        noise=rng.normal(0, "validation", 0, shape=(1, 16, 4, 4)),
        steps=2,
        guidance_scale=3.5,
        compute=ms.float32,
    )
    base = np.asarray(sampling.decode_latents(vae, latents, ms.float32)[0]).astype(int)
    images = [pixels(infer("--controlnet_conditioning_scale", scale, "--overwrite")) for scale in (0, 0.5, 1)]
    np.testing.assert_array_equal(images[0], base)
    assert 0 < np.abs(images[1] - base).mean() < np.abs(images[2] - base).mean()


def test_a_condition_is_encoded_as_in_training(small_flux, shapes, warm_cache):
    """The mean of the posterior, shifted and scaled; the moments are those that training caches."""
    vae = loading.load_model(small_flux, "vae", precision.resolve_precision("no"))
    config = configs.read_config(small_flux, "vae")
    stage = encoder_stage.EncoderStage(small_flux, None, "no", warm_cache / "mindtune", 16)
    sample = image_sample.Sample("0", outline(shapes, 0))
    mean = stage.moments(sample, (32, 32), False)[:16].astype(np.float64)
    image = conditions.condition_image(outline(shapes, 0), "--control_image", 32)
    latents = sampling.encode_image(vae, image, ms.float32)
    expected = (mean - config["shift_factor"]) * config["scaling_factor"]
    np.testing.assert_allclose(latents[0], expected, rtol=1e-5, atol=1e-6)


def test_an_image_has_the_aspect_ratio_of_its_condition(infer, tmp_path):
    """The shorter side is --resolution, the longer one the nearest multiple of 16: 60 x 90 becomes 32 x 48."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(tmp_path / "tall.png")
    assert Image.open(infer("--control_image", tmp_path / "tall.png")).size == (32, 48)


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_half_precision_generates_nearly_the_same(infer, mixed_precision):
    full = pixels(infer())
    half = pixels(infer("--mixed_precision", mixed_precision, "--overwrite"))
    assert np.abs(half - full).mean() < 1


@pytest.mark.parametrize(
    "more, message",
    [
        (["--resolution", 40], "--resolution 40: must be divisible by 16"),
        (["--controlnet", "nowhere"], "--controlnet nowhere: no such directory"),
        (["--control_image", "nowhere.png"], "--control_image nowhere.png: cannot be read as an image"),
        (["--prompt", "a", "b", "c", "--control_image", "x.png", "y.png"], "--prompt has 3 and --control_image 2"),
        (["--output", "x.jpg"], "--output x.jpg: .* are written as PNG"),
        (["--num_images_per_prompt", 0], "--num_images_per_prompt 0: must be at least 1"),
        (["--num_inference_steps", 0], "--num_inference_steps 0: must be at least 1"),
        (["--max_sequence_length", 0], "--max_sequence_length 0: must be at least 1"),
        (["--max_sequence_length", 600], "--max_sequence_length 600: .*512"),
    ],
)
def test_bad_flags_are_refused(infer, more, message, monkeypatch):
    def too_early(*_):
        pytest.fail("a model was loaded before the flags were checked")

    monkeypatch.setattr(loading, "load_model", too_early)
    monkeypatch.setattr(encoder_stage, "run_in_child", too_early)
    with pytest.raises(UserError, match=message):
        infer(*more)


@pytest.mark.parametrize("existing", ["x.png", "x-2.png"])
def test_an_existing_image_is_not_replaced(infer, tmp_path, existing):
    (tmp_path / existing).write_text("existing")
    with pytest.raises(UserError, match=f"{existing}: is already there"):
        infer("--num_images_per_prompt", 2)
    assert (tmp_path / existing).read_text() == "existing"
    assert not list(tmp_path.glob("x-1.png"))
