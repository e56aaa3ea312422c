"""Which models the scripts can train: finds unsupported or contradictory settings in a pipeline's class and configs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from mindtune import diffusion
from mindtune.cli import UserError
from mindtune.models.configs import class_of, config_file, control_inputs, read_config
from mindtune.models.weights import read_json

# Prefix of a pipeline's class -> the model family, and the scripts that train it. The longest matching prefix counts.
FAMILIES = {
    "Flux": ("FLUX.1", "flux_lora/, flux_controlnet/ and examples/flux_*/"),
    "Flux2": ("FLUX.2", ""),
    "StableDiffusionXL": ("Stable Diffusion XL", "examples/controlnet/train_controlnet_sdxl.py"),
    "StableDiffusion3": ("Stable Diffusion 3", ""),
    "StableDiffusion": ("Stable Diffusion 1 or 2", "examples/controlnet/train_controlnet.py"),
}
# What a script trains, its task -> the pipeline class that is made for it. A script also takes text-to-image models.
TASKS = {
    "text-to-image": None,
    "kontext": "FluxKontextPipeline",
    "control": "FluxControlPipeline",
    "fill": "FluxFillPipeline",
}
# Pipeline classes whose weights need another training method than the rest of their family.
SPECIAL = {
    "FluxKontextPipeline": "it edits a reference image. Train it with examples/flux_kontext/, or give "
    "black-forest-labs/FLUX.1-dev",
    "FluxFillPipeline": "it fills a masked image. Train it with examples/flux_control/ and --fill, or give "
    "black-forest-labs/FLUX.1-dev",
    "FluxPriorReduxPipeline": "it encodes images for another pipeline. Give black-forest-labs/FLUX.1-dev",
    "FluxControlPipeline": "it reads a condition with the latents. Train it with examples/flux_control/, or give "
    "black-forest-labs/FLUX.1-dev",
    "StableDiffusionUpscalePipeline": "it reads a small image with the latents. Give the text-to-image model",
    "StableDiffusionLatentUpscalePipeline": "it reads a small image with the latents. Give the text-to-image model",
    "StableDiffusionInstructPix2PixPipeline": "it edits a reference image. Give the text-to-image model",
    "StableDiffusionXLInstructPix2PixPipeline": "it edits a reference image. Give the text-to-image model",
    "StableDiffusionDepth2ImgPipeline": "it reads a depth map with the latents. Give the text-to-image model",
}
# Numbers of input channels of models that read more than the noisy latents.
EXTRA_INPUTS = {
    384: "a fill model (latents, masked image and mask)",
    128: "a model that reads a condition with the latents (Canny, Depth)",
    9: "an inpainting model (latents, masked image and mask)",
    8: "an image editing model",
    7: "an upscaler",
    5: "a depth model",
}
# Config keys for which only one value is supported: another one changes what the model computes.
REQUIRED_VALUES = {
    "unet": {
        "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None, "time_cond_proj_dim": None,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "shift_terminal": None, "time_shift_type": "exponential", "invert_sigmas": False, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
    },
}  # fmt: skip


def class_problem(root: Path, components: dict, task: str) -> Optional[str]:
    """Describes why the class in model_index.json cannot be trained; None for supported and for unknown classes."""
    if not {"transformer", "unet"} & components.keys():
        return None
    expected = (
        "Flux"
        if "transformer" in components
        else "StableDiffusionXL"
        if "text_encoder_2" in components
        else "StableDiffusion"
    )
    try:
        found = read_json(root, root / "model_index.json").get("_class_name")
    except (OSError, ValueError):
        return None  # reported with the other problems
    found = str(found)
    if found in SPECIAL and found != TASKS[task]:
        return f"model_index.json: _class_name is {found}: {SPECIAL[found]}"
    family = max((family for family in FAMILIES if found.startswith(family)), key=len, default=expected)
    if family != expected:
        title, script = FAMILIES[family]
        advice = f"train it with {script}" if script else "it is not supported"
        return f"model_index.json: _class_name is {found}, {title}; {advice}"
    return None


def model_problems(root: Path, components: dict, task: str) -> list[str]:
    """Describes every setting in the configs that is not supported or that contradicts another config."""
    configs = {name: read_config(root, name) for name in components if (root / config_file(name)).is_file()}
    base = "transformer" if "transformer" in components else "unet"
    problems = _scheduler_problems(configs["scheduler"], base) if "scheduler" in configs else []
    if "vae" in configs:
        problems += vae_problems(root, "vae")
    if base not in configs:
        return problems
    expectations = _transformer_expectations(configs) if base == "transformer" else _unet_expectations(configs)
    for key, value, expected, reason in (*_common_expectations(configs, base, task), *expectations):
        if value != expected:
            problems.append(f"{base}/config.json: {key} is {value}, expected {expected}{reason}")
    return problems


Expectation = tuple[str, Any, Any, str]  # key, its value, the supported value, the reason


def _common_expectations(configs: dict[str, dict], base: str, task: str) -> Iterator[Expectation]:
    """The expectations that a transformer and a UNet share."""
    config = configs[base]
    if vae := configs.get("vae"):
        channels = vae["latent_channels"] * (4 if base == "transformer" else 1)
        reads_condition = task in ("control", "fill") and config["in_channels"] == control_inputs(vae, task == "fill")
        if not reads_condition:
            model = EXTRA_INPUTS.get(config["in_channels"], "a model that reads more than the noisy latents")
            yield "in_channels", config["in_channels"], channels, f": {model}. Give the text-to-image model"
        if reads_condition or config["out_channels"] is not None:  # None: as many as in_channels
            reason = ": it does not predict noise. Give the text-to-image model"
            yield "out_channels", config["out_channels"], channels, reason
    for key, expected in REQUIRED_VALUES.get(base, {}).items():
        yield key, config.get(key), expected, ", the only supported value. Give another model"


def _transformer_expectations(configs: dict[str, dict]) -> Iterator[Expectation]:
    config = configs["transformer"]
    dims = config["axes_dims_rope"]
    yield "the sum of axes_dims_rope", sum(dims), config["attention_head_dim"], ", which is attention_head_dim"
    if t5 := configs.get("text_encoder_2"):
        yield "joint_attention_dim", config["joint_attention_dim"], t5["d_model"], ", the width of text_encoder_2"
    if clip := configs.get("text_encoder"):
        width = clip["hidden_size"]
        yield "pooled_projection_dim", config["pooled_projection_dim"], width, ", the width of text_encoder"


def _unet_expectations(configs: dict[str, dict]) -> Iterator[Expectation]:
    config, clip, second = configs["unet"], configs.get("text_encoder"), configs.get("text_encoder_2")
    mid_blocks = ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"]
    if config["mid_block_type"] not in mid_blocks:
        yield "mid_block_type", config["mid_block_type"], " or ".join(mid_blocks), ": a ControlNet has one"
    if not isinstance(config["layers_per_block"], int):
        reason = ": a ControlNet has the same number in every block"
        yield "layers_per_block", config["layers_per_block"], "one number", reason
    expected, model = ("text_time", "Stable Diffusion XL") if second else (None, "Stable Diffusion 1 and 2")
    reason = f", as in {model}. Use the script for the other model"
    yield "addition_embed_type", config["addition_embed_type"], expected, reason
    if clip:
        width = clip["hidden_size"] + (second["hidden_size"] if second else 0)
        yield "cross_attention_dim", config["cross_attention_dim"], width, ", the width of the text encoders"
    if second and config["addition_embed_type"] == "text_time":
        width = second["projection_dim"] + 6 * config["addition_time_embed_dim"]
        key = "projection_class_embeddings_input_dim"
        reason = ": it reads other values than height, width and crop. Give a base model, not a refiner"
        yield key, config[key], width, reason


def _scheduler_problems(scheduler: dict, base: str) -> list[str]:
    file, cls = "scheduler/scheduler_config.json", class_of(scheduler)
    timesteps = scheduler.get("num_train_timesteps", 1000)
    if not (isinstance(timesteps, int) and timesteps >= 1):
        return [f"{file}: num_train_timesteps is {timesteps}, expected a number such as 1000"]
    if base == "transformer":
        keys = ("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        wrong = [key for key in keys if not _is_number(scheduler[key])]
        if wrong:
            return [
                f"{file}: {key} is {scheduler[key]}, expected a number. Give FLUX.1-dev's scheduler_config.json"
                for key in wrong
            ]
        if scheduler["base_image_seq_len"] >= scheduler["max_image_seq_len"]:
            return [
                f"{file}: base_image_seq_len is {scheduler['base_image_seq_len']}, expected less than max_image_seq_len"
            ]
        required = REQUIRED_VALUES["FlowMatchEulerDiscreteScheduler"]
        return [
            f"{file}: {key} is {scheduler[key]}, and only {value} is supported. Give FLUX.1-dev's scheduler_config.json"
            for key, value in required.items()
            if (scheduler.get(key) if scheduler.get(key) is not None else value) != value
        ]
    if missing := [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in scheduler]:
        edm = ", as in a model trained with EDM noise" if "sigma_data" in scheduler else ""
        return [
            f"{file}: {cls} has no {', '.join(missing)}{edm}. Only noise schedules with betas are supported; "
            "give another model"
        ]
    try:
        diffusion.alphas_cumprod(scheduler), diffusion.prediction_type(scheduler)
    except UserError as error:
        return [str(error)]
    return []


def vae_problems(root: Path, name: str) -> list[str]:
    """Describes invalid values of the scale of latents in a VAE's config.

    latents_mean and latents_std must both be given, with one number per channel.
    """
    config = read_config(root, name)
    scale, shift = config["scaling_factor"], config["shift_factor"]
    if not (_is_number(scale) and scale > 0):
        return [f"{name}/config.json: scaling_factor is {scale}, expected a number above 0, such as 0.18215"]
    if not (shift is None or _is_number(shift)):
        return [f"{name}/config.json: shift_factor is {shift}, expected a number or null"]
    given = {key: config[key] for key in ("latents_mean", "latents_std") if config[key] is not None}
    wrong = [
        f"{key} is {value}" for key, value in given.items() if not _is_list_of_numbers(value, config["latent_channels"])
    ]
    if "latents_std" in given and not wrong and min(given["latents_std"]) <= 0:
        wrong.append(f"latents_std is {given['latents_std']}, and each must be above 0")
    if len(given) == 1:
        wrong.append(f"{next(iter(given))} is given without the other")
    if given and config["shift_factor"]:
        wrong.append(f"shift_factor is {config['shift_factor']}, and latents_mean is given too")
    return [
        f"{name}/config.json: {problem}; expected latents_mean and latents_std with latent_channels numbers each"
        for problem in wrong
    ]


def _is_list_of_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
