"""infer_control_lora_flux.py: images that follow a condition or fill a mask, the same as those of validation."""

import shlex
import shutil

import mindspore as ms
import numpy as np
import pytest
from conftest import edit, load_script, run_here
from PIL import Image
from safetensors.numpy import load_file, save_file

from mindtune import rng
from mindtune.cli import UserError
from mindtune.data import conditions, grids
from mindtune.encode import encoder_stage
from mindtune.models import configs, loading, precision, sampling

PROMPT = "a red circle"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def script():
    return load_script("examples/flux_control/infer_control_lora_flux.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Four pairs of the shapes world, 48 pixels square, and a mask of the upper half."""
    folder = tmp_path_factory.mktemp("shapes") / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(folder, 4, 48, seed=0, split="train")
    half = np.zeros((48, 48), np.uint8)
    half[:24] = 255
    Image.fromarray(half).save(folder / "mask.png")
    return folder


def picture(shapes, number, kind="conditioning"):
    return shapes / kind / f"{number:06d}.png"


@pytest.fixture(scope="module")
def train(small_flux, shapes, encoder_cache, tmp_path_factory):
    """train(*flags): a run of three updates at a high rate, with norms and two validation images per condition."""
    script = load_script("examples/flux_control/train_control_lora_flux.py")

    def run(*more):
        out = tmp_path_factory.mktemp("trained") / "run"
        flags = ["--pretrained_model_name_or_path", small_flux, "--train_data_dir", shapes, "--output_dir", out]
        flags += shlex.split("--resolution 32 --max_sequence_length 16 --seed 0 --mindspore_mode 1 --report_to none")
        flags += shlex.split("--cache_latents --learning_rate 1e-2 --train_batch_size 2 --max_train_steps 3")
        flags += shlex.split("--num_validation_images 2 --num_inference_steps 2 --train_norm_layers")
        flags += ["--cache_dir", encoder_cache, "--upcast_before_saving", "--validation_prompt", PROMPT]
        run_here(script, [*flags, *more])
        return out

    return run


@pytest.fixture(scope="module")
def trained(train, shapes):
    return train("--validation_image", picture(shapes, 0), picture(shapes, 1))


@pytest.fixture(scope="module")
def trained_to_fill(train, shapes):
    images = "--validation_image", picture(shapes, 0, "images"), picture(shapes, 1, "images")
    return train("--fill", *images, "--validation_mask", shapes / "mask.png")


@pytest.fixture
def infer(script, small_flux, shapes, encoder_cache, tmp_path):
    """infer(*flags): runs the script in this process and returns the path of --output; later flags win."""

    def run(*more):
        base = ["--pretrained_model_name_or_path", small_flux, "--cache_dir", encoder_cache, "--prompt", PROMPT]
        base += ["--control_image", picture(shapes, 0), "--output", tmp_path / "x.png", "--overwrite"]
        base += shlex.split("--resolution 32 --num_inference_steps 2 --max_sequence_length 16")
        run_here(script, [*base, *more])
        return tmp_path / "x.png"

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_training_and_inference_generate_the_same_images(infer, trained, shapes, tmp_path):
    """A row of the grid starts with its condition. The norms are part of the file."""
    assert any(".norm_q." in name for name in load_file(trained / LORA))
    both = "--control_image", picture(shapes, 0), picture(shapes, 1), "--num_images_per_prompt", 2
    grid = infer("--lora", trained, *both)
    assert np.abs(pixels(grid) - pixels(trained / "samples" / "final.png")).max() <= 1
    singles = [Image.open(tmp_path / f"x-{n}.png") for n in (1, 2, 3, 4)]
    assert {single.size for single in singles} == {(32, 32)} and len({single.tobytes() for single in singles}) == 4
    found = [conditions.condition_image(picture(shapes, n), "--control_image", 32) for n in (0, 1)]
    rows = [[image, *singles[2 * n : 2 * n + 2]] for n, image in enumerate(found)]
    np.testing.assert_array_equal(pixels(grid), np.asarray(grids.image_grid(rows, [PROMPT] * 2)))
    # The same noise with another condition gives another image.
    assert np.abs(pixels(tmp_path / "x-1.png") - pixels(tmp_path / "x-3.png")).mean() > 0.1


def test_filling_in_training_and_inference_generates_the_same_images(infer, trained_to_fill, shapes):
    """Of the image only what the mask leaves black is read."""
    masked = ["--fill", "--mask_image", shapes / "mask.png", "--lora", trained_to_fill]
    both = "--control_image", picture(shapes, 0, "images"), picture(shapes, 1, "images"), "--num_images_per_prompt", 2
    grid = infer(*masked, *both)
    assert np.abs(pixels(grid) - pixels(trained_to_fill / "samples" / "final.png")).max() <= 1


def test_only_what_the_mask_leaves_black_is_read(infer, trained_to_fill, tmp_path):
    image, mask = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8), np.zeros((32, 32), np.uint8)
    mask[4:20, 9:23] = 255
    pictures = {"mask": mask, "a": image[0], "b": np.where(mask == 255, *image[::-1])}
    pictures["c"] = 255 - image[0]
    for name, values in pictures.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    flags = "--fill", "--lora", trained_to_fill, "--mask_image", tmp_path / "mask.png", "--control_image"
    same, changed, other = (infer(*flags, tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert same == changed != other


def test_scale_zero_is_the_base_and_a_larger_one_is_further_from_it(infer, trained, small_flux, encoder_cache):
    """The base, whose input layer is not widened, has not read the condition. Its norms are not those of the file."""
    full = precision.resolve_precision("no")
    transformer, vae = (loading.load_model(small_flux, part, full) for part in ("transformer", "vae"))
    text = encoder_stage.EncoderStage(small_flux, None, "no", encoder_cache / "mindtune", 16).text(PROMPT)
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
    zero, half, whole = (pixels(infer("--lora", trained, "--lora_scale", scale)) for scale in (0, 0.5, 1))
    assert np.abs(zero - base).max() <= 1  # sums over twice the inputs are rounded otherwise
    assert 1 < np.abs(half - base).mean() < np.abs(whole - base).mean()


@pytest.fixture(scope="module")
def control_model(trained, small_flux, tmp_path_factory):
    """A pipeline like FLUX.1-Depth-dev: the Control-LoRA is merged into its weights, by NumPy."""
    root = shutil.copytree(small_flux, tmp_path_factory.mktemp("merged") / "control")
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    weights, adapter = load_file(file), load_file(trained / LORA)
    adapter = {name.removeprefix("transformer."): value for name, value in adapter.items()}
    present = weights["x_embedder.weight"]
    weights["x_embedder.weight"] = np.pad(present, ((0, 0), (0, present.shape[1])))
    for name, value in adapter.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            product = adapter[f"{layer}.lora_B.weight"].astype(np.float64) @ value
            weights[f"{layer}.weight"] = (weights[f"{layer}.weight"] + product).astype(np.float32)
        elif ".lora_" not in name:
            weights[name] = value.astype(np.float32)
    save_file(weights, file, metadata={"format": "pt"})
    edit(root / "transformer" / "config.json", in_channels=128, out_channels=64)
    edit(root / "model_index.json", _class_name="FluxControlPipeline")
    return root


def test_a_model_that_reads_conditions_needs_no_lora(infer, trained, control_model):
    with_lora = pixels(infer("--lora", trained))
    alone = pixels(infer("--pretrained_model_name_or_path", control_model))
    assert np.abs(alone - with_lora).max() <= 1


@pytest.mark.parametrize("flag", ["--mixed_precision=fp16", "--mixed_precision=bf16", "--base_precision=int8"])
def test_lower_precision_generates_nearly_the_same(infer, trained, flag):
    full = pixels(infer("--lora", trained))
    assert 0 < np.abs(pixels(infer("--lora", trained, flag)) - full).mean() < 1


def test_an_image_has_the_aspect_ratio_of_its_condition(infer, trained_to_fill, tmp_path):
    """The shorter side is --resolution, the longer one the nearest multiple of 16; the mask is fitted to it."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "tall.png")
    Image.fromarray(noise[:30, :50, 0]).save(tmp_path / "mask.png")
    flags = "--fill", "--control_image", tmp_path / "tall.png", "--mask_image", tmp_path / "mask.png"
    assert Image.open(infer("--lora", trained_to_fill, *flags)).size == (32, 48)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--resolution", 40], "--resolution 40: must be divisible by 16"),
        (["--fill"], "--fill: needs --mask_image"),
        (["--mask_image", "x.png"], "--mask_image: needs --fill"),
        (["--fill", "--mask_image", "x.png", "y.png"], "--mask_image has 2 for 1 rows"),
        (["--fill", "--mask_image", "nowhere.png"], "--mask_image nowhere.png: cannot be read as an image"),
        (["--control_image", "nowhere.png"], "--control_image nowhere.png: cannot be read as an image"),
        (["--lora", "nowhere"], "--lora nowhere: no such file"),
        ([], "a text-to-image model, which reads no condition. Add --lora"),
        (["--num_inference_steps", 0], "--num_inference_steps 0: must be at least 1"),
    ],
)
def test_bad_flags_are_refused(infer, more, message, monkeypatch):
    def too_early(*_):
        pytest.fail("a model was loaded before the flags were checked")

    monkeypatch.setattr(loading, "load_model", too_early)
    monkeypatch.setattr(encoder_stage, "run_in_child", too_early)
    with pytest.raises(UserError, match=message):
        infer(*more)


def test_a_lora_of_another_system_is_refused(infer, tmp_path):
    """It has no weights for the condition, which would be ignored."""
    layer = "transformer.transformer_blocks.0.attn.to_q"
    a, b = np.ones((1, 32), np.float32), np.ones((32, 1), np.float32)
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="--lora: adapts no x_embedder, which reads the condition"):
        infer("--lora", tmp_path / "text.safetensors")


def test_a_lora_of_the_other_input_layer_is_refused(infer, trained, shapes):
    """One that was not trained to fill has half of the further inputs."""
    with pytest.raises(UserError, match="made for another model; A and B of x_embedder"):
        infer("--fill", "--mask_image", shapes / "mask.png", "--lora", trained)
