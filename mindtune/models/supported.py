"""Which models the scripts train: what a pipeline's class and configs say that they do not compute, or that does not go together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from mindtune import diffusion
from mindtune.cli import UserError
from mindtune.models.configs import class_of, config_file, read_config
from mindtune.models.weights import read_json

# How the class of a pipeline begins -> what it is, and the scripts that train it. The longest beginning counts.
FAMILIES = {
    "Flux": ("FLUX.1", "flux_lora/ and flux_controlnet/"),
    "Flux2": ("FLUX.2", ""),
    "StableDiffusionXL": ("Stable Diffusion XL", "examples/controlnet/train_controlnet_sdxl.py"),
    "StableDiffusion3": ("Stable Diffusion 3", ""),
    "StableDiffusion": ("Stable Diffusion 1 or 2", "examples/controlnet/train_controlnet.py"),
}
# Classes of pipelines whose weights are trained in another way than those of their family.
SPECIAL = {
    "FluxKontextPipeline": "it edits a reference image, and would be trained as text-to-image. Give black-forest-labs/FLUX.1-dev",
    "FluxFillPipeline": "it fills a masked image. Give black-forest-labs/FLUX.1-dev",
    "FluxPriorReduxPipeline": "it encodes images for another pipeline. Give black-forest-labs/FLUX.1-dev",
    "FluxControlPipeline": "it reads a condition beside the latents. Give black-forest-labs/FLUX.1-dev",
    "StableDiffusionUpscalePipeline": "it reads a small image beside the latents. Give the text-to-image model",
    "StableDiffusionLatentUpscalePipeline": "it reads a small image beside the latents. Give the text-to-image model",
    "StableDiffusionInstructPix2PixPipeline": "it edits a reference image. Give the text-to-image model",
    "StableDiffusionXLInstructPix2PixPipeline": "it edits a reference image. Give the text-to-image model",
    "StableDiffusionDepth2ImgPipeline": "it reads a depth map beside the latents. Give the text-to-image model",
}
# Input channels of models that read more than the noisy latents.
EXTRA_INPUTS = {
    384: "a model that fills (latents, masked image and mask)", 128: "a model with a condition beside the latents (Canny, Depth)",
    9: "an inpainting model (latents, masked image and mask)", 8: "a model that edits an image", 7: "an upscaler", 5: "a depth model",
}  # fmt: skip
# Keys of which only the given value is computed here. Another one would train a model in a way that it was not made for.
ONLY = {
    "unet": {
        "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None, "time_cond_proj_dim": None,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "shift_terminal": None, "time_shift_type": "exponential", "invert_sigmas": False, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
    },
}  # fmt: skip


def class_problem(root: Path, components: dict) -> Optional[str]:
    """What is wrong with the class that model_index.json names. A class that is not known is left to the checks of the configs."""
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
        return None  # told with the other defects
    found = str(found)
    if found in SPECIAL:
        return f"model_index.json: _class_name is {found}: {SPECIAL[found]}"
    family = max((family for family in FAMILIES if found.startswith(family)), key=len, default=expected)
    if family != expected:
        title, script = FAMILIES[family]
        return f"model_index.json: _class_name is {found}, {title}; " + (
            f"train it with {script}" if script else "it is not supported"
        )
    return None


def model_problems(root: Path, components: dict) -> list[str]:
    """What configs say that the scripts do not compute, or that does not go together."""
    configs = {name: read_config(root, name) for name in components if (root / config_file(name)).is_file()}
    base = "transformer" if "transformer" in components else "unet"
    problems = _scheduler_problems(configs["scheduler"], base) if "scheduler" in configs else []
    if "vae" in configs:
        problems += vae_problems(root, "vae")
    if base not in configs:
        return problems
    for key, value, wanted, why in _expected(configs, base):
        if value != wanted:
            problems.append(f"{base}/config.json: {key} is {value}, expected {wanted}{why}")
    return problems


def _expected(configs: dict[str, dict], base: str) -> Iterator[tuple[str, Any, Any, str]]:
    """Of the transformer or UNet: key, its value, the value that the scripts can train with, and what another one means."""
    config, flux = configs[base], base == "transformer"
    clip, second = configs.get("text_encoder"), configs.get("text_encoder_2")
    if vae := configs.get("vae"):
        channels = vae["latent_channels"] * (4 if flux else 1)
        what = EXTRA_INPUTS.get(config["in_channels"], "a model that reads more than the noisy latents")
        yield "in_channels", config["in_channels"], channels, f": {what}. Give the text-to-image model"
        if config["out_channels"] is not None:
            yield (
                "out_channels",
                config["out_channels"],
                channels,
                ": it does not predict noise. Give the text-to-image model",
            )
    for key, wanted in ONLY.get(base, {}).items():
        yield key, config.get(key), wanted, ", and nothing else is computed here. Give another model"
    if flux:
        dims = config["axes_dims_rope"]
        yield "the sum of axes_dims_rope", sum(dims), config["attention_head_dim"], ", which is attention_head_dim"
        if second:
            yield (
                "joint_attention_dim",
                config["joint_attention_dim"],
                second["d_model"],
                ", the width of text_encoder_2",
            )
        if clip:
            yield (
                "pooled_projection_dim",
                config["pooled_projection_dim"],
                clip["hidden_size"],
                ", the width of text_encoder",
            )
        return
    if config["mid_block_type"] not in (blocks := ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"]):
        yield "mid_block_type", config["mid_block_type"], " or ".join(blocks), ": a ControlNet has one"
    if not isinstance(config["layers_per_block"], int):
        yield "layers_per_block", config["layers_per_block"], "one number", ": a ControlNet has as many in every block"
    wanted, advice = ("text_time", "Stable Diffusion XL's") if second else (None, "Stable Diffusion 1's and 2's")
    yield "addition_embed_type", config["addition_embed_type"], wanted, f", {advice}. Use the script of the other model"
    if clip:
        width = clip["hidden_size"] + (second["hidden_size"] if second else 0)
        yield "cross_attention_dim", config["cross_attention_dim"], width, ", the width of the text encoders"
    if second and config["addition_embed_type"] == "text_time":
        width = second["projection_dim"] + 6 * config["addition_time_embed_dim"]
        key = "projection_class_embeddings_input_dim"
        yield (
            key,
            config[key],
            width,
            ": it reads other sizes than height, width and crop. Give a base model, not a refiner",
        )


def _scheduler_problems(scheduler: dict, base: str) -> list[str]:
    file, cls = "scheduler/scheduler_config.json", class_of(scheduler)
    if not (
        isinstance(scheduler.get("num_train_timesteps", 1000), int) and scheduler.get("num_train_timesteps", 1000) >= 1
    ):
        return [f"{file}: num_train_timesteps is {scheduler['num_train_timesteps']}, expected a number such as 1000"]
    if base == "transformer":
        wrong = [key for key in ("shift", "base_shift", "max_shift") if not _number(scheduler[key])]
        wrong += [key for key in ("base_image_seq_len", "max_image_seq_len") if not _number(scheduler[key])]
        if wrong:
            return [
                f"{file}: {key} is {scheduler[key]}, expected a number. Give FLUX.1-dev's scheduler_config.json"
                for key in wrong
            ]
        if scheduler["base_image_seq_len"] >= scheduler["max_image_seq_len"]:
            return [
                f"{file}: base_image_seq_len is {scheduler['base_image_seq_len']}, expected less than max_image_seq_len"
            ]
        only = ONLY["FlowMatchEulerDiscreteScheduler"]
        return [
            f"{file}: {key} is {scheduler[key]}, and only {value} is computed here. Give FLUX.1-dev's scheduler_config.json"
            for key, value in only.items()
            if (scheduler.get(key) if scheduler.get(key) is not None else value) != value
        ]
    if lacking := [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in scheduler]:
        edm = ", which was trained with EDM's noise" if "sigma_data" in scheduler else ""
        return [
            f"{file}: {cls} has no {', '.join(lacking)}{edm}. Models with such noise are not supported; give one with betas"
        ]
    try:
        diffusion.alphas_cumprod(scheduler), diffusion.prediction_type(scheduler)
    except UserError as error:
        return [str(error)]
    return []


def vae_problems(root: Path, name: str) -> list[str]:
    """What cannot be the scale of latents. latents_mean and latents_std are given together, a number for every channel."""
    config = read_config(root, name)
    scale, shift = config["scaling_factor"], config["shift_factor"]
    if not (_number(scale) and scale > 0):
        return [f"{name}/config.json: scaling_factor is {scale}, expected a number above 0, such as 0.18215"]
    if not (shift is None or _number(shift)):
        return [f"{name}/config.json: shift_factor is {shift}, expected a number or null"]
    given = {key: config[key] for key in ("latents_mean", "latents_std") if config[key] is not None}
    wrong = [f"{key} is {value}" for key, value in given.items() if not _numbers(value, config["latent_channels"])]
    if "latents_std" in given and not wrong and min(given["latents_std"]) <= 0:
        wrong.append(f"latents_std is {given['latents_std']}, and each has to be above 0")
    if len(given) == 1:
        wrong.append(f"{next(iter(given))} is there without the other")
    if given and config["shift_factor"]:
        wrong.append(f"shift_factor is {config['shift_factor']} beside latents_mean")
    return [
        f"{name}/config.json: {problem}; expected latents_mean and latents_std of latent_channels numbers each"
        for problem in wrong
    ]


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_number, value))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
