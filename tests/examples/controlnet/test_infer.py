"""Drawing with a trained ControlNet: the same seed gives the same bytes, the loop is that of mindone's pipelines."""

import mindone.diffusers
import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from mindtune import rng
from mindtune.cli import UserError
from mindtune.data import conditions
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.models import configs, controlnets, loading, named_parameters, precision, sampling

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
def draw(sd, perturbed, shapes, encoder_cache, tmp_path):
    """draw(name, *flags): runs the inference script in this process; the picture's bytes."""

    def run(name, *more):
        base = [
            "--pretrained_model_name_or_path",
            sd.root,
            "--controlnet",
            perturbed[sd.kind],
            "--cache_dir",
            encoder_cache,
        ]
        base += [
            "--prompt",
            "a red circle",
            "--control_image",
            shapes / "conditioning" / "000000.png",
            "--resolution",
            64,
        ]
        base += ["--num_inference_steps", 2, "--output", tmp_path / f"{name}.png"]
        assert sd.infer.main([str(part) for part in (*base, *more)]) == 0
        return (tmp_path / f"{name}.png").read_bytes()

    return run


def test_the_seed_the_condition_the_prompt_and_the_strength_all_count(draw, shapes):
    first = draw("first")
    assert draw("again") == first
    others = [
        draw("seed", "--seed", 1),
        draw("strength", "--controlnet_conditioning_scale", 0),
        draw("condition", "--control_image", shapes / "conditioning" / "000001.png"),
        draw("prompt", "--prompt", "a blue star"),
        draw("guidance", "--guidance_scale", 1),
    ]
    assert len({first, *others}) == 6


def test_several_pictures_in_a_grid_not_square_and_in_half(draw, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)).save(tmp_path / "wide.png")
    draw("grid", "--control_image", tmp_path / "wide.png", "--num_images_per_prompt", 2, "--mixed_precision", "fp16")
    assert Image.open(tmp_path / "grid-1.png").size == Image.open(tmp_path / "grid-2.png").size == (96, 64)
    with pytest.raises(UserError, match="already there"):
        draw("grid", "--num_images_per_prompt", 2)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_the_latents_are_those_of_mindones_pipeline(sd, perturbed, shapes, encoder_cache, guidance):
    """Prompt to latents in mindone's own pipeline, text encoders and all, with UniPC and the same noise; in steps that its guidance skips
    nothing. Relative to the largest entry."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    full = precision.resolve_precision("no")
    kind = "sd" if sd.kind == "sd15" else "sdxl"
    stage = EncoderStage(sd.root, None, "no", encoder_cache / "mindtune", 77, system=kind)
    stage.prepare(["a red circle", ""], [])
    unet, controlnet = (
        loading.load_model(sd.root, "unet", full),
        loading.load_model(perturbed[sd.kind].parent, sd.kind, full),
    )
    condition = conditions.condition_image(str(shapes / "conditioning" / "000000.png"), "--control_image", 64)
    pixels, noise = conditions.condition_pixels(condition), rng.normal(0, "noise", shape=(1, 4, 8, 8))
    scheduler = configs.read_config(sd.root, "scheduler")
    control = (controlnet, pixels, 0.8)
    ours = sampling.sample_unet_latents(
        unet, scheduler, stage.text("a red circle"), stage.unconditional(), noise, 4, guidance, ms.float32, control
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
        "a red circle", image=condition, height=64, width=64, num_inference_steps=4, guidance_scale=guidance, latents=ms.Tensor(noise),
        controlnet_conditioning_scale=0.8, output_type="latent",
    )[0].asnumpy()  # fmt: skip
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


def test_a_trained_controlnet_draws_in_both_places(sd, run, draw, shapes, tmp_path):
    """The final validation picture of a run is what the inference script draws with the saved ControlNet."""
    condition = shapes / "conditioning" / "000000.png"
    run(
        sd,
        tmp_path / "run",
        "--validation_prompt",
        "a red circle",
        "--validation_image",
        condition,
        "--learning_rate",
        1e-2,
    )
    assert (tmp_path / "run" / FINAL).is_file()
    draw("drawn", "--controlnet", tmp_path / "run")
    grid, drawn = Image.open(tmp_path / "run" / "samples" / "final.png"), Image.open(tmp_path / "drawn.png")
    side = grid.width // 2
    seen = np.asarray(
        grid.crop((side, grid.height - side, grid.width, grid.height)).resize((64, 64), Image.Resampling.NEAREST), int
    )
    assert np.abs(seen - np.asarray(drawn, int)).max() <= 1
