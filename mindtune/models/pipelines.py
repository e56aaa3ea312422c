"""Finds a pipeline, or a single model for one, in a local directory or on the hub, and checks it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Optional

from mindtune.cli import UserError, indented_list
from mindtune.models import hubs
from mindtune.models.configs import read_config
from mindtune.models.library import config_defaults
from mindtune.models.pipeline_checks import check_pipeline, component_problems, tokenizer_problems
from mindtune.models.supported import vae_problems
from mindtune.models.weights import file_patterns, stored_tensors

# Component -> its supported classes, as model_index.json and the configs name them. Empty: any class.
FLUX_COMPONENTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "vae": ("AutoencoderKL",),
    "transformer": ("FluxTransformer2DModel",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
SD_COMPONENTS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
    "scheduler": (),  # only its betas and prediction type are used; images are sampled with UniPC
}
SDXL_COMPONENTS = {
    **SD_COMPONENTS,
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
# Class of a base model -> the class of its ControlNets, and the config keys that must be equal in both.
CONTROLNETS = {
    "FluxTransformer2DModel": (
        "FluxControlNetModel",
        (
            "num_attention_heads",
            "attention_head_dim",
            "axes_dims_rope",
            "in_channels",
            "joint_attention_dim",
            "pooled_projection_dim",
        ),
    ),
    "UNet2DConditionModel": (
        "ControlNetModel",
        (
            "in_channels",
            "down_block_types",
            "block_out_channels",
            "layers_per_block",
            "cross_attention_dim",
            "addition_embed_type",
            "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
        ),
    ),
}
# Prefixes of tensors that only a ControlNet for several types of conditions (union) has.
UNION_TENSORS = ("task_embedding", "control_add_embedding", "controlnet_mode_embedder", "spatial_ch_projs")


# ---- pipelines -----------------------------------------------------------------------------------


def resolve_pipeline(
    name: str,
    revision: Optional[str],
    variant: Optional[str],
    cache_dir: Optional[str],
    components: dict,
    weights: bool = True,
    hub: str = hubs.DEFAULT,
    task: str = "text-to-image",
) -> Path:
    """The directory of a pipeline: `name` if it is a local directory, otherwise downloaded from `hub`. Checks it.

    Downloads only files of the `components`: configs, tokenizers, and safetensors of the variant, or those without a
    variant if a component has none. Without `weights` only the configs are needed. Raises UserError if there is no such
    pipeline, if it is not complete, or if a script for this `task` cannot train it (`check_pipeline`).
    """
    flag, root, hub_files = "--pretrained_model_name_or_path", Path(name), None
    if not root.is_dir():
        hub_files = hubs.list_files(flag, name, revision, hub)
        patterns = ["model_index.json"]
        for component in components:
            patterns += _download_patterns(component, variant, weights, hub_files)
        root = hubs.download(flag, name, revision, cache_dir, patterns, hub)
    check_pipeline(root, components, variant, weights, hub_files, task)
    return root


def _download_patterns(
    component: str, variant: Optional[str], weights: bool, hub_files: Optional[list[str]]
) -> list[str]:
    """Glob patterns of the files that a component needs."""
    if not weights:
        return [f"{component}/*config.json"]
    patterns = [f"{component}/{pattern}" for pattern in ("*.json", "*.txt", "*.model")]
    of_variant = [f"{component}/{pattern}" for pattern in file_patterns(component, variant)]
    if hub_files and not any(fnmatchcase(file, pattern) for file in hub_files for pattern in of_variant):
        return patterns + [f"{component}/{pattern}" for pattern in file_patterns(component)]
    return patterns + of_variant


# ---- single models -------------------------------------------------------------------------------


def resolve_model(
    name: str, flag: str, cache_dir: Optional[str], cls: str, weights: bool = True, hub: str = hubs.DEFAULT
) -> Path:
    """The directory of a single model of class `cls`, local or from the hub. Raises UserError with every problem."""
    path, existing = Path(name), None
    if not path.is_dir():
        existing = hubs.list_files(flag, name, None, hub)
        patterns = ["config.json", "*.index.json", *(file_patterns("") if weights else [])]
        path = hubs.download(flag, name, None, cache_dir, patterns, hub)
    path = path.resolve()  # "." has no name
    unsupported, broken = component_problems(path.parent, path.name, (cls,), None, weights, existing)
    if unsupported:
        raise UserError(
            f"{flag} {name}: cannot be used:\n{indented_list(unsupported)}\n"
            "docs/models.md lists the published models that can."
        )
    # There is no --variant for a single model.
    broken = [re.sub(r": add --variant .*", ": rename them without the variant", problem) for problem in broken]
    if broken:
        raise UserError(f"{flag} {name}: not a complete {cls}:\n{indented_list(broken)}\nCopy or download it again.")
    return path


def resolve_vae(
    name: str,
    flag: str,
    cache_dir: Optional[str],
    root: Path,
    base: str,
    weights: bool = True,
    hub: str = hubs.DEFAULT,
) -> Path:
    """The directory of a VAE that replaces the pipeline's. `base` is the component that reads the latents.

    Raises UserError if the VAE is not complete or has another number of latent channels. Prints a warning if its scale
    differs from that of the pipeline's VAE.
    """
    path = resolve_model(name, flag, cache_dir, "AutoencoderKL", weights, hub)
    vae, model = read_config(path.parent, path.name), read_config(root, base)
    pipeline_vae = read_config(root, "vae")
    if vae["latent_channels"] != model["in_channels"]:
        raise UserError(
            f"{flag} {name}: latent_channels is {vae['latent_channels']}, the {base} reads {model['in_channels']}. "
            "Give a VAE made for this model."
        )
    if problems := vae_problems(path.parent, path.name):
        raise UserError(
            f"{flag} {name}: cannot be used:\n{indented_list(problems)}\n"
            "Give the config.json that was published with it."
        )
    keys = ("scaling_factor", "latents_mean", "latents_std")
    if [vae[key] for key in keys] != [pipeline_vae[key] for key in keys]:
        print(
            f"{flag} {name}: its scaling_factor is {vae['scaling_factor']}, the pipeline's VAE has "
            f"{pipeline_vae['scaling_factor']}; results are worse with another VAE than the model was trained with"
        )
    return path


def vae_overflows(folder: Optional[Path], mixed_precision: str) -> bool:
    """Whether SDXL's VAE must be computed in float32.

    The pipeline's own VAE (`folder` None) always; another one only in fp16 and if its config says so.
    """
    if folder is None:
        return True
    return mixed_precision == "fp16" and bool(read_config(folder.parent, folder.name)["force_upcast"])


def resolve_tokenizer(name: str, flag: str, cache_dir: Optional[str], hub: str = hubs.DEFAULT) -> Path:
    """The directory of a CLIP tokenizer, local or from the hub. Raises UserError if it lacks a file."""
    path = Path(name)
    if not path.is_dir():
        path = hubs.download(flag, name, None, cache_dir, ["*.json", "merges.txt"], hub)
    path = path.resolve()
    if problems := tokenizer_problems(path.parent, path.name, ("CLIPTokenizer",)):
        raise UserError(f"{flag} {name}: not a CLIP tokenizer:\n{indented_list(problems)}\nGive the directory of one.")
    return path


def resolve_controlnet(
    name: str, flag: str, cache_dir: Optional[str], base: dict, weights: bool = True, hub: str = hubs.DEFAULT
) -> Path:
    """The directory of an existing ControlNet, local or from the hub, for the model whose config is `base`.

    Raises UserError if it is not found or not complete, if it was made for another model, or if it cannot be trained
    here: it supports several types of conditions (union), or its condition does not have three channels.
    """
    cls, shared_keys = CONTROLNETS[base["_class_name"]]
    path = resolve_model(name, flag, cache_dir, cls, weights, hub)
    config, defaults = read_config(path.parent, path.name), config_defaults(cls)
    pixels = "a ControlNet that takes its condition as pixels, not as the VAE's latents,"
    for key, controlnet in (
        ("num_mode", "a union ControlNet"),
        ("num_control_type", "a union ControlNet"),
        ("conditioning_embedding_channels", pixels),
    ):
        if config.get(key) is not None:
            raise UserError(
                f"{flag} {name}: {controlnet} ({key} {config[key]}) is not supported. Give one for a single condition."
            )
    if config.get("conditioning_channels", 3) != 3:
        raise UserError(
            f"{flag} {name}: conditioning_channels is {config['conditioning_channels']}, and a condition image has 3. "
            "Give a ControlNet that reads one RGB image."
        )
    for key in shared_keys:
        if config.get(key, defaults.get(key)) != base.get(key):
            raise UserError(
                f"{flag} {name}: its {key} is {config.get(key)}, the base model's is {base.get(key)}. "
                "Give one made for this model."
            )
    if any(path.glob("*.safetensors")):
        tensors = [key for key in stored_tensors(path.parent, path.name) if key.startswith(UNION_TENSORS)]
        if tensors:
            raise UserError(
                f"{flag} {name}: a union ControlNet (its file has {tensors[0]}) is not supported. "
                "Give one for a single condition."
            )
    return path
