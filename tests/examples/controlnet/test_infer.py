"""infer_controlnet*.py: the same seed gives the same bytes, and the latents are those of mindone's pipelines."""

import json
from types import SimpleNamespace

import mindone.diffusers
import mindspore as ms
import numpy as np
import pytest
from conftest import encode_here, run_here
from PIL import Image

from mindtune import rng
from mindtune.cli import UserError
from mindtune.data import conditions
from mindtune.encode import encoder_stage
from mindtune.models import configs, controlnets, loading, named_parameters, precision, sampling
from mindtune.run.validation_rows import Row

from .conftest import FINAL


@pytest.fixture(scope="module")
def perturbed(pipelines, tmp_path_factory):
    """perturbed[kind]: a ControlNet whose zero projections have values, on disk."""
    folders = {}
    for kind, root in pipelines.items():
        unet = loading.load_model(root, "unet", precision.resolve_precision("no"))
        controlnet = controlnets.unet_controlnet(unet, 0)
        for name, parameter in named_parameters.model_parameters(controlnet).items():
            parameter.set_data(parameter + ms.Tensor(0.05 * rng.normal(0, name, shape=parameter.shape)))
        folders[kind] = tmp_path_factory.mktemp("controlnet") / kind
        loading.save_model(controlnet, folders[kind], ms.float32)
    return folders


@pytest.fixture
def infer(sd, perturbed, shapes, encoder_cache, tmp_path):
    """infer(name, *flags): runs the inference script in this process; the bytes of the image."""

    def run(name, *more):
        base = ["--pretrained_model_name_or_path", sd.root, "--controlnet", perturbed[sd.kind]]
        base += ["--cache_dir", encoder_cache, "--prompt", "a red circle", "--resolution", 64]
        base += ["--control_image", shapes / "conditioning" / "000000.png", "--num_inference_steps", 2]
        base += ["--output", tmp_path / f"{name}.png"]
        run_here(sd.infer, [*base, *more])
        return (tmp_path / f"{name}.png").read_bytes()

    return run


def test_the_seed_the_condition_the_prompt_and_the_scales_change_the_image(infer, shapes):
    first = infer("first")
    assert infer("again") == first
    others = [
        infer("seed", "--seed", 1),
        infer("strength", "--controlnet_conditioning_scale", 0),
        infer("condition", "--control_image", shapes / "conditioning" / "000001.png"),
        infer("prompt", "--prompt", "a blue star"),
        infer("guidance", "--guidance_scale", 1),
    ]
    assert len({first, *others}) == 6


def test_a_grid_of_images_that_are_not_square_in_fp16(infer, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)).save(tmp_path / "wide.png")
    infer("grid", "--control_image", tmp_path / "wide.png", "--num_images_per_prompt", 2, "--mixed_precision", "fp16")
    assert Image.open(tmp_path / "grid-1.png").size == Image.open(tmp_path / "grid-2.png").size == (96, 64)
    with pytest.raises(UserError, match="already there"):
        infer("grid", "--num_images_per_prompt", 2)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_the_latents_are_those_of_mindones_pipeline(sd, perturbed, shapes, encoder_cache, monkeypatch, guidance):
    """mindone's own pipeline with its text encoders, UniPC and the same noise; errors relative to the largest entry."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    full = precision.resolve_precision("no")
    kind = "sd" if sd.kind == "sd15" else "sdxl"
    stage = encoder_stage.EncoderStage(sd.root, None, "no", encoder_cache / "mindtune", 77, system=kind)
    monkeypatch.setattr(encoder_stage, "run_in_child", encode_here)
    stage.prepare(["a red circle", ""], [])
    unet = loading.load_model(sd.root, "unet", full)
    controlnet = loading.load_model(perturbed[sd.kind].parent, sd.kind, full)
    condition = conditions.condition_image(str(shapes / "conditioning" / "000000.png"), "--control_image", 64)
    noise = rng.normal(0, "noise", shape=(1, 4, 8, 8))
    ours = sampling.sample_unet_latents(
        unet,
        configs.read_config(sd.root, "scheduler"),
        text=stage.text("a red circle"),
        empty=stage.unconditional(),
        noise=noise,
        steps=4,
        guidance_scale=guidance,
        compute=ms.float32,
        control=(controlnet, conditions.condition_pixels(condition), 0.8),
    )

    tail = "XLControlNetPipeline" if kind == "sdxl" else "ControlNetPipeline"
    more = {} if kind == "sdxl" else {"safety_checker": None}
    plain = mindone.diffusers.ControlNetModel.from_pretrained(str(perturbed[sd.kind]))
    pipeline = getattr(mindone.diffusers, f"StableDiffusion{tail}").from_pretrained(
        str(sd.root), controlnet=plain, **more
    )
    pipeline.scheduler = mindone.diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red circle",
        image=condition,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=ms.Tensor(noise),
        controlnet_conditioning_scale=0.8,
        output_type="latent",
    )[0].asnumpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


def test_training_and_inference_generate_the_same_image(sd, run, infer, shapes, tmp_path):
    """The final validation image of a run is what the inference script generates with the saved ControlNet."""
    condition = shapes / "conditioning" / "000000.png"
    validation = ["--validation_prompt", "a red circle", "--validation_image", condition]
    line = {"prompt": "a blue star", "seed": 5, "steps": 3, "guidance": 2.0, "scale": 0.3, "image": str(condition)}
    lines = [line, {**line, "negative_prompt": "a red circle"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    validation += ["--validation_file", tmp_path / "rows.jsonl"]
    run(sd, tmp_path / "run", *validation, "--learning_rate", 1e-2)
    assert (tmp_path / "run" / FINAL).is_file()
    infer("image", "--controlnet", tmp_path / "run")
    grid = Image.open(tmp_path / "run" / "samples" / "final.png")
    image = Image.open(tmp_path / "image.png")
    side = grid.width // 2
    cell = grid.crop((side, grid.height - side, grid.width, grid.height)).resize((64, 64), Image.Resampling.NEAREST)
    assert np.abs(np.asarray(cell, int) - np.asarray(image, int)).max() <= 1

    # A row of the file, too; with a negative prompt it is another image.
    settings = ["--prompt", "a blue star", "--seed", 5, "--num_inference_steps", 3, "--guidance_scale", 2]
    infer("row", "--controlnet", tmp_path / "run", *settings, "--controlnet_conditioning_scale", 0.3)
    row, negative = (Image.open(tmp_path / "run" / "samples" / "final" / f"row-0{n}.png") for n in (1, 2))
    difference = np.abs(np.asarray(row, int) - np.asarray(Image.open(tmp_path / "row.png"), int))
    assert difference.max() <= 1 and np.abs(np.asarray(row, int) - np.asarray(negative, int)).max() > 1


def test_a_row_reaches_the_sampler(sd, sd_flags, tmp_path, monkeypatch):
    """Its size, noise, steps, scales and negative prompt, of an image that is not square."""
    calls = []
    monkeypatch.setattr(sampling, "sample_unet_latents", lambda *given: calls.append(given))
    monkeypatch.setattr(sampling, "decode_latents", lambda *_: ["image"])
    stage = SimpleNamespace(text=lambda prompt: f"text of {prompt}", unconditional=lambda: "text of ")
    vae = SimpleNamespace(config={"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]})
    row = Row("a", 5, 3, 2.0, (64, 96), number=2, scale=0.3, condition=Image.new("RGB", (96, 64), "white"))
    args = sd.train.parse_args(sd_flags(sd, tmp_path))
    dtype = [None] if sd.kind == "sdxl" else []
    models = {"unet": "unet", "controlnet": "controlnet"}
    sampler = sd.train.ValidationSampler(args, [], stage, models, *dtype, "scheduler")
    negatives = {None: "text of ", "": "text of ", "b": "text of b"}
    for prompt in negatives:
        assert sampler.image(vae, row._replace(negative_prompt=prompt)) == "image"
    assert [call[3] for call in calls] == list(negatives.values())
    unet, scheduler, text, _, noise, *numbers, (controlnet, pixels, scale) = calls[0]
    assert (unet, scheduler, text, controlnet, scale) == ("unet", "scheduler", "text of a", "controlnet", 0.3)
    assert numbers == [3, 2.0, ms.float32] and pixels.shape == (1, 3, 64, 96) and pixels.min() == 1
    np.testing.assert_array_equal(noise, rng.normal(5, "validation", 2, shape=(1, 4, 8, 12)))
