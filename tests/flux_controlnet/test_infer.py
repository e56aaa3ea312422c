"""The inference script: pictures that follow a condition, the same as training drew them."""

import mindspore as ms
import numpy as np
import pytest
from conftest import load_script
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
    """Three updates from a ControlNet whose projections are not zero, so that the condition shows, and the final picture grid."""
    out = tmp_path_factory.mktemp("trained") / "run"
    controlnet = controlnets.flux_controlnet(small_flux, 1, 1)
    for name, parameter in named_parameters.model_parameters(controlnet).items():
        if name.startswith("controlnet_"):
            parameter.set_data(ms.Tensor(0.2 * rng.normal(0, name, shape=parameter.shape)))
    loading.save_model(controlnet, out.parent / "begun", ms.float32)
    flags = [
        "--pretrained_model_name_or_path",
        small_flux,
        "--train_data_dir",
        shapes,
        "--resolution",
        32,
        "--max_sequence_length",
        16,
    ]
    flags += [
        "--cache_dir",
        warm_cache,
        "--output_dir",
        out,
        "--seed",
        0,
        "--mindspore_mode",
        1,
        "--report_to",
        "none",
        "--use_ema",
    ]
    flags += ["--controlnet_model_name_or_path", out.parent / "begun", "--cache_latents", "--learning_rate", 1e-2]
    flags += ["--validation_prompt", "a red circle", "--validation_image", outline(shapes, 0), outline(shapes, 1)]
    flags += ["--num_validation_images", 2, "--num_inference_steps", 2, "--train_batch_size", 2, "--max_train_steps", 3]
    flags += ["--controlnet_conditioning_scale", 0.7]
    control_script.main([str(flag) for flag in flags])
    return out


@pytest.fixture
def draw(script, small_flux, shapes, warm_cache, trained, tmp_path):
    """draw(*flags): runs the script in this process; later flags win."""

    def run(*more):
        base = ["--pretrained_model_name_or_path", small_flux, "--cache_dir", warm_cache, "--controlnet", trained]
        base += [
            "--prompt",
            "a red circle",
            "--control_image",
            outline(shapes, 0),
            "--resolution",
            32,
            "--num_inference_steps",
            2,
        ]
        base += ["--max_sequence_length", 16, "--output", tmp_path / "x.png"]
        script.main([str(word) for word in (*base, *more)])
        return tmp_path / "x.png"

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_one_picture_is_the_file_itself_and_the_same_bytes_again(draw):
    first = draw().read_bytes()
    assert Image.open(draw("--overwrite")).size == (32, 32)
    assert draw("--overwrite").read_bytes() == first
    assert draw("--overwrite", "--seed", 1).read_bytes() != first


def test_training_and_inference_draw_the_same_pictures(draw, trained, shapes, tmp_path):
    """Training drew with the average that it saved; the grid holds a row a condition, begun by it, and beside it are the singles."""
    both = ["--control_image", outline(shapes, 0), outline(shapes, 1)]
    grid = draw(*both, "--num_images_per_prompt", 2, "--controlnet_conditioning_scale", 0.7)
    assert np.abs(pixels(grid) - pixels(trained / "samples" / "final.png")).max() <= 1
    singles = [Image.open(tmp_path / f"x-{n}.png") for n in (1, 2, 3, 4)]
    assert {single.size for single in singles} == {(32, 32)} and len({single.tobytes() for single in singles}) == 4
    conditions = [conditions.condition_image(outline(shapes, n), "--control_image", 32) for n in (0, 1)]
    rows = [[conditions[0], *singles[:2]], [conditions[1], *singles[2:]]]
    np.testing.assert_array_equal(pixels(grid), np.asarray(grids.image_grid(rows, ["a red circle"] * 2)))
    # The same noise under another condition is another picture.
    assert np.abs(pixels(tmp_path / "x-1.png") - pixels(tmp_path / "x-3.png")).mean() > 0.1


def test_scale_zero_is_the_base_model_and_more_is_further_from_it(draw, small_flux, warm_cache):
    kind = precision.resolve_precision("no")
    transformer, vae = (loading.load_model(small_flux, part, kind) for part in ("transformer", "vae"))
    text = encoder_stage.EncoderStage(small_flux, None, "no", warm_cache / "mindtune", 16).text("a red circle")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    latents = sampling.sample_latents(
        transformer, configs.read_config(small_flux, "scheduler"), text["prompt_embeds"][None], text["pooled_prompt_embeds"][None],
        rng.normal(0, "validation", 0, shape=(1, 16, 4, 4)), 2, 3.5, ms.float32,
    )  # fmt: skip
    base = np.asarray(sampling.decode_latents(vae, latents, ms.float32)[0]).astype(int)
    drawn = [pixels(draw("--controlnet_conditioning_scale", scale, "--overwrite")) for scale in (0, 0.5, 1)]
    np.testing.assert_array_equal(drawn[0], base)
    assert 0 < np.abs(drawn[1] - base).mean() < np.abs(drawn[2] - base).mean()


def test_a_condition_is_encoded_as_in_training(small_flux, shapes, warm_cache):
    """The posterior's mean, shifted and scaled; the moments are those that training caches."""
    kind = precision.resolve_precision("no")
    vae, config = loading.load_model(small_flux, "vae", kind), configs.read_config(small_flux, "vae")
    sample = image_sample.Sample("0", outline(shapes, 0))
    mean = (
        encoder_stage.EncoderStage(small_flux, None, "no", warm_cache / "mindtune", 16)
        .moments(sample, (32, 32), False)[:16]
        .astype(np.float64)
    )
    given = sampling.encode_image(
        vae, conditions.condition_image(outline(shapes, 0), "--control_image", 32), ms.float32
    )
    np.testing.assert_allclose(
        given[0], (mean - config["shift_factor"]) * config["scaling_factor"], rtol=1e-5, atol=1e-6
    )


def test_a_picture_keeps_the_conditions_shape(draw, tmp_path):
    """The shorter side is --resolution, the longer one the nearest multiple of 16: 60 x 90 becomes 32 x 48."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(tmp_path / "tall.png")
    assert Image.open(draw("--control_image", tmp_path / "tall.png")).size == (32, 48)


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_half_precision_draws_nearly_the_same(draw, mixed_precision):
    full = pixels(draw())
    half = pixels(draw("--mixed_precision", mixed_precision, "--overwrite"))
    assert np.abs(half - full).mean() < 1


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--resolution", 40], "--resolution 40: must be divisible by 16"),
        (["--controlnet", "nowhere"], "--controlnet nowhere: no such directory"),
        (["--control_image", "nowhere.png"], "--control_image nowhere.png: cannot be read as an image"),
        (["--prompt", "a", "b", "c", "--control_image", "x.png", "y.png"], "--prompt has 3 and --control_image 2"),
        (["--output", "x.jpg"], "--output x.jpg: pictures are written as PNG"),
        (["--num_images_per_prompt", 0], "--num_images_per_prompt 0: must be at least 1"),
        (["--num_inference_steps", 0], "--num_inference_steps 0: must be at least 1"),
        (["--max_sequence_length", 0], "--max_sequence_length 0: must be at least 1"),
        (["--max_sequence_length", 600], "--max_sequence_length 600: .*512"),
    ],
)
def test_bad_flags_get_a_sentence(draw, more, sentence, monkeypatch):
    monkeypatch.setattr(
        loading, "load_model", lambda *_: pytest.fail("a model was loaded before the flags were checked")
    )
    monkeypatch.setattr(
        encoder_stage, "_in_child", lambda *_: pytest.fail("encoders ran before the flags were checked")
    )
    with pytest.raises(UserError, match=sentence):
        draw(*more)


@pytest.mark.parametrize("there", ["x.png", "x-2.png"])
def test_a_picture_that_is_there_is_not_replaced(draw, tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=f"{there}: is already there"):
        draw("--num_images_per_prompt", 2)
    assert (tmp_path / there).read_text() == "mine"
    assert not list(tmp_path.glob("x-1.png"))
