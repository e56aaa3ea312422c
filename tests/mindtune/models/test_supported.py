"""Which models the scripts can train, by the class of the pipeline and by configs."""

import json
import shutil

import pytest
from conftest import edit
from pipeline_cases import error_message, tiny_pipeline, unsupported

from mindtune.cli import UserError
from mindtune.models.configs import read_config
from mindtune.models.pipeline_checks import check_pipeline
from mindtune.models.pipelines import FLUX_COMPONENTS, SD_COMPONENTS, SDXL_COMPONENTS
from mindtune.models.supported import model_problems


@pytest.fixture
def sd(tmp_path_factory, tmp_path):
    """A copy of a Stable Diffusion pipeline that a test may change."""
    return shutil.copytree(tiny_pipeline(tmp_path_factory, "sd15"), tmp_path / "sd")


@pytest.mark.parametrize(
    "cls, expected",
    [
        ("FluxKontextPipeline", "it edits a reference image"),
        ("FluxFillPipeline", "it fills a masked image"),
        ("FluxControlPipeline", "it reads a condition with the latents"),
        (
            "StableDiffusionXLPipeline",
            "Stable Diffusion XL; train it with examples/controlnet/train_controlnet_sdxl.py",
        ),
        ("StableDiffusionPipeline", "Stable Diffusion 1 or 2; train it with examples/controlnet/train_controlnet.py"),
        ("Flux2Pipeline", "FLUX.2; it is not supported"),
        ("FluxPriorReduxPipeline", "it encodes images for another pipeline"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3; it is not supported"),
    ],
)
def test_a_pipeline_of_another_class(pipeline, cls, expected):
    edit(pipeline / "model_index.json", _class_name=cls)
    message = error_message(pipeline, weights=False)
    assert (
        message == error_message(pipeline)
        and f"model_index.json: _class_name is {cls}" in message
        and expected in message
    )


TASK_CLASSES = {"kontext": "FluxKontextPipeline", "control": "FluxControlPipeline", "fill": "FluxFillPipeline"}


@pytest.mark.parametrize("task", TASK_CLASSES)
def test_a_script_takes_the_pipelines_of_its_task_and_text_to_image_models(pipeline, task):
    """And no others, which it sends to their script."""
    for cls in (TASK_CLASSES[task], "FluxPipeline"):
        edit(pipeline / "model_index.json", _class_name=cls)
        check_pipeline(pipeline, FLUX_COMPONENTS, task=task)
    for other in TASK_CLASSES.keys() - {task}:
        edit(pipeline / "model_index.json", _class_name=TASK_CLASSES[other])
        with pytest.raises(UserError, match=f"{TASK_CLASSES[other]}: it .* Train it with examples/flux_"):
            check_pipeline(pipeline, FLUX_COMPONENTS, task=task)


@pytest.mark.parametrize(
    "task, accepted",
    [("text-to-image", [64]), ("kontext", [64]), ("control", [64, 128]), ("fill", [64, 384])],
)
def test_the_inputs_of_a_transformer_for_each_task(pipeline, task, accepted):
    """A model that reads a condition predicts as many values as one that reads none."""
    for inputs in (64, 96, 128, 384):
        edit(pipeline / "transformer" / "config.json", in_channels=inputs, out_channels=64)
        if inputs in accepted:
            check_pipeline(pipeline, FLUX_COMPONENTS, weights=False, task=task)
            continue
        with pytest.raises(UserError, match=f"in_channels is {inputs}, expected 64: .* Give the text-to-image model"):
            check_pipeline(pipeline, FLUX_COMPONENTS, weights=False, task=task)
    edit(pipeline / "transformer" / "config.json", in_channels=accepted[-1], out_channels=accepted[-1] + 1)
    with pytest.raises(UserError, match=f"out_channels is {accepted[-1] + 1}, expected 64"):
        check_pipeline(pipeline, FLUX_COMPONENTS, weights=False, task=task)


@pytest.mark.parametrize(
    "cls", ["FluxPipeline", "FluxImg2ImgPipeline", "FluxControlNetPipeline", "SomebodysOwnPipeline", None]
)
def test_pipelines_with_the_same_weights(pipeline, cls):
    edit(pipeline / "model_index.json", _class_name=cls)
    check_pipeline(pipeline, FLUX_COMPONENTS)


@pytest.mark.parametrize(
    "part, key, value, expected",
    [
        ("transformer", "in_channels", 384, "in_channels is 384, expected 64: a fill model"),
        (
            "transformer",
            "in_channels",
            128,
            "in_channels is 128, expected 64: a model that reads a condition with the latents",
        ),
        ("transformer", "out_channels", 32, "out_channels is 32, expected 64"),
        (
            "transformer",
            "joint_attention_dim",
            48,
            "joint_attention_dim is 48, expected 32, the width of text_encoder_2",
        ),
        (
            "transformer",
            "pooled_projection_dim",
            48,
            "pooled_projection_dim is 48, expected 32, the width of text_encoder",
        ),
        (
            "transformer",
            "quantization_config",
            {"quant_method": "bitsandbytes"},
            "quantization_config says bitsandbytes. Quantised",
        ),
        (
            "text_encoder_2",
            "quantization_config",
            {"quant_method": "quanto"},
            "quantization_config says quanto. Quantised",
        ),
        ("scheduler", "shift_terminal", 0.1, "shift_terminal is 0.1, and only None is supported"),
        ("scheduler", "time_shift_type", "linear", "time_shift_type is linear, and only exponential is supported"),
        ("vae", "latents_mean", [0.0] * 16, "latents_mean is given without the other"),
        ("vae", "scaling_factor", None, "scaling_factor is null, expected such as 0.18215"),
        ("vae", "scaling_factor", 0, "scaling_factor is 0, expected a number above 0"),
        ("vae", "shift_factor", "a", "shift_factor is a, expected a number or null"),
        ("vae", "block_out_channels", None, "block_out_channels is null, expected such as (64,)"),
        (
            "transformer",
            "axes_dims_rope",
            [4, 6, 4],
            "the sum of axes_dims_rope is 14, expected 16, which is attention_head_dim",
        ),
        ("scheduler", "base_shift", None, "base_shift is null, expected such as 0.5"),
        ("scheduler", "num_train_timesteps", "1000", "num_train_timesteps is 1000, expected a number such as 1000"),
        ("scheduler", "max_image_seq_len", 256, "base_image_seq_len is 256, expected less than max_image_seq_len"),
    ],
)
def test_other_flux_models(pipeline, part, key, value, expected):
    """The configs show it, so --dry_run reports the same."""
    edit(pipeline / (f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"), **{key: value})
    lines = unsupported(pipeline)
    assert any(line.startswith(f"{part}/") and expected in line for line in lines)
    assert unsupported(pipeline, weights=False) == lines


@pytest.mark.parametrize("task, inputs", [("control", 128), ("fill", 384)])
def test_a_model_that_reads_conditions_predicts_the_latents_alone(pipeline, task, inputs):
    """out_channels null, the default, would be as many as in_channels."""
    for outputs, expected in ((64, []), (None, ["transformer/config.json: out_channels is None, expected 64"])):
        edit(pipeline / "transformer" / "config.json", in_channels=inputs, out_channels=outputs)
        found = model_problems(pipeline, FLUX_COMPONENTS, task)
        assert [line.split(": it does")[0] for line in found] == expected


@pytest.mark.parametrize(
    "part, key, value, expected",
    [
        ("unet", "in_channels", 9, "in_channels is 9, expected 4: an inpainting model"),
        ("unet", "in_channels", 7, "in_channels is 7, expected 4: an upscaler"),
        ("unet", "addition_embed_type", "text_time", "addition_embed_type is text_time, expected None"),
        ("unet", "mid_block_type", None, "mid_block_type is None, expected UNetMidBlock2DCrossAttn or UNetMidBlock2D"),
        ("unet", "layers_per_block", [1, 1, 1, 1], "layers_per_block is [1, 1, 1, 1], expected one number"),
        ("scheduler", "beta_end", 2.0, "beta_start 0.00085 and beta_end 2.0 give betas outside (0, 1)"),
        ("unet", "num_class_embeds", 1000, "num_class_embeds is 1000, expected None"),
        ("unet", "cross_attention_dim", 64, "cross_attention_dim is 64, expected 32, the width of the text encoders"),
        ("scheduler", "prediction_type", "sample", "prediction_type sample is not supported"),
        ("scheduler", "rescale_betas_zero_snr", True, "rescaled or listed betas are not supported"),
    ],
)
def test_other_stable_diffusion_models(sd, part, key, value, expected):
    edit(sd / (f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"), **{key: value})
    lines = unsupported(sd, SD_COMPONENTS)
    assert any(line.startswith(f"{part}/") and expected in line for line in lines)
    assert unsupported(sd, SD_COMPONENTS, weights=False) == lines


def test_any_scheduler_with_betas_is_accepted(sd):
    """Also a class that mindone lacks: only the betas and the prediction type are used."""
    path = sd / "scheduler" / "scheduler_config.json"
    for cls in ("DEISMultistepScheduler", "DDIMScheduler", "TCDScheduler", "NobodysScheduler"):
        edit(path, _class_name=cls)
        check_pipeline(sd, SD_COMPONENTS)
    path.write_text(json.dumps({"_class_name": "NobodysScheduler", "beta_start": 0.001, "beta_end": 0.01}))
    (line,) = unsupported(sd, SD_COMPONENTS)
    assert line.startswith("scheduler/scheduler_config.json: NobodysScheduler has no beta_schedule.")


def test_a_scheduler_without_betas(sd):
    """As in Playground 2.5. Downloading again would not help, so the message does not say so."""
    path = sd / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"})
    )
    (line,) = unsupported(sd, SD_COMPONENTS)
    expected = "has no beta_start, beta_end, beta_schedule, as in a model trained with EDM noise"
    assert f"EDMDPMSolverMultistepScheduler {expected}" in line


def test_missing_keys_have_the_defaults_of_the_class(sd, pipeline, tmp_path_factory):
    """A published config lacks the keys that were added to its class later."""
    path = sd / "vae" / "config.json"
    config = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("scaling_factor", "latents_mean")
    }
    path.write_text(json.dumps(config))
    found = read_config(sd, "vae")
    assert (found["scaling_factor"], found["shift_factor"], found["latents_mean"]) == (0.18215, None, None)
    assert found["block_out_channels"] == config["block_out_channels"]
    (pipeline / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}'
    )
    scheduler = read_config(pipeline, "scheduler")
    assert (scheduler["use_dynamic_shifting"], scheduler["num_train_timesteps"], scheduler["max_shift"]) == (
        False,
        1000,
        1.15,
    )
    edit(pipeline / "transformer" / "config.json", _diffusers_version="0.30")
    assert read_config(pipeline, "transformer")["out_channels"] is None
    clip = pipeline / "text_encoder" / "config.json"
    clip.write_text(
        json.dumps({key: value for key, value in json.loads(clip.read_text()).items() if key != "projection_dim"})
    )
    assert read_config(pipeline, "text_encoder")["projection_dim"] == 512
    check_pipeline(tiny_pipeline(tmp_path_factory, "sdxl"), SDXL_COMPONENTS)
