"""Finding a pipeline or one of its parts, and checking from configs and headers alone whether a script can train with it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional

from mindtune import diffusion
from mindtune.cli import UserError, listing
from mindtune.library import config_defaults
from mindtune.weights import (
    FOREIGN,
    PICKLED,
    POINTER,
    file_patterns,
    file_problem,
    has_variant,
    is_pointer,
    missing_file,
    read_json,
    stored_tensors,
    weight_files,
)

# Component -> classes it may be of, as model_index.json and the configs name them; none: any that has what is read.
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
    "scheduler": (),  # only the betas and the prediction type are read; images are drawn with UniPC
}
SDXL_COMPONENTS = {
    **SD_COMPONENTS,
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
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
# The ControlNet that belongs to a model, and what both have to agree on.
CONTROLNETS = {
    "FluxTransformer2DModel": (
        "FluxControlNetModel",
        ("num_attention_heads", "attention_head_dim", "axes_dims_rope", "in_channels", "joint_attention_dim", "pooled_projection_dim"),
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
UNION_TENSORS = ("task_embedding", "control_add_embedding", "controlnet_mode_embedder", "spatial_ch_projs")
# What `load_tokenizer` can read: any one of these sets of files.
TOKENIZER_FILES = {"CLIP": (("vocab.json", "merges.txt"),), "T5": (("tokenizer.json",), ("spiece.model",))}
WEIGHTS = (".safetensors", *PICKLED, *FOREIGN)  # endings of files that hold some
QUANTISED = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "U8": "packed 4-bit or 8-bit", "I8": "8-bit integer"}


# ---- configs ---------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def from_files(folder: Path) -> Iterator[None]:
    """Says of whatever goes wrong inside that the files of `folder` are to blame: libraries raise anything for odd values. UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be made from its files ({type(error).__name__}: {error}). Copy or download them again."
        ) from error


def config_file(name: str) -> str:
    return f"{name}/scheduler_config.json" if name == "scheduler" else f"{name}/config.json"


def read_config(root: Path, name: str) -> dict[str, Any]:
    """A component's config.json (scheduler_config.json), with its class's defaults for the keys that it lacks.

    Those keys are listed as `_use_default_values`, as diffusers does: another class made of the config has its own defaults for them.
    Raises ValueError naming the file if it is torn, OSError if it is missing.
    """
    found = read_json(root, root / config_file(name))
    if isinstance(found.get("text_config"), dict) and "architectures" in found:  # of a whole CLIP
        found = {**found, **found["text_config"], "architectures": found["architectures"]}
    defaults = {key: value for key, value in config_defaults(class_of(found)).items() if key not in found}
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    return {**found, **defaults, "_use_default_values": [*defaults]}


def class_of(config: dict[str, Any]) -> str:
    """The class that a config names."""
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else "(none named)"
    return str(config.get("_class_name") or named)


# ---- finding ---------------------------------------------------------------------------------------------------------------------------


def resolve_pipeline(
    name: str, revision: Optional[str], variant: Optional[str], cache_dir: Optional[str], components: dict, weights: bool = True
) -> Path:
    """A local directory as it is, anything else from the hub; then checks it. Without `weights` only the configs need to be there.

    From the hub come only the files of the named components: configs, tokenizers, and safetensors of the variant, or plain ones where
    a component has none of the variant. Raises UserError if it is neither, not whole, or not what the script trains (`check_pipeline`).
    """
    flag, root, there = "--pretrained_model_name_or_path", Path(name), None
    if not root.is_dir():
        there, patterns = _hub_files(flag, name, revision), ["model_index.json"]
        for part in components:
            patterns += [f"{part}/{kind}" for kind in (("*.json", "*.txt", "*.model") if weights else ("*config.json",))]
            if weights:
                of_variant = [f"{part}/{pattern}" for pattern in file_patterns(part, variant)]
                lacks = there and not any(fnmatchcase(file, pattern) for file in there for pattern in of_variant)
                patterns += [f"{part}/{pattern}" for pattern in file_patterns(part)] if lacks else of_variant
        root = _download(flag, name, revision, cache_dir, patterns)
    check_pipeline(root, components, variant, weights, there)
    return root


def resolve_part(name: str, flag: str, cache_dir: Optional[str], cls: str, weights: bool = True) -> Path:
    """The directory of a model that stands alone (local, or from the hub), whole. Raises UserError naming all defects."""
    path, there = Path(name), None
    if not path.is_dir():
        there = _hub_files(flag, name, None)
        path = _download(flag, name, None, cache_dir, ["config.json", "*.index.json", *(file_patterns("") if weights else [])])
    path = path.resolve()  # "." has no name
    unsupported, broken = _part_problems(path.parent, path.name, (cls,), None, weights, there)
    if unsupported:
        raise UserError(f"{flag} {name}: cannot be used:\n{listing(unsupported)}\ndocs/models.md says which published models can.")
    broken = [re.sub(r": add --variant .*", ": rename them without it, which is how they are read", line) for line in broken]
    if broken:
        raise UserError(f"{flag} {name}: not a whole {cls}:\n{listing(broken)}\nCopy or download it again.")
    return path


def resolve_vae(name: str, flag: str, cache_dir: Optional[str], root: Path, base: str, weights: bool = True) -> Path:
    """The directory of a VAE that stands in for the pipeline's. Raises UserError if it is not whole or of another width."""
    path = resolve_part(name, flag, cache_dir, "AutoencoderKL", weights)
    vae, model = read_config(path.parent, path.name), read_config(root, base)
    own = read_config(root, "vae")
    if vae["latent_channels"] != model["in_channels"]:
        raise UserError(f"{flag} {name}: latent_channels is {vae['latent_channels']}, the {base} reads {model['in_channels']}. "
                        "Give a VAE made for this model.")  # fmt: skip
    if problems := _vae_problems(path.parent, path.name):
        raise UserError(f"{flag} {name}: cannot be used:\n{listing(problems)}\nGive the config.json that was published with it.")
    scales = [(config["scaling_factor"], config["latents_mean"], config["latents_std"]) for config in (own, vae)]
    if scales[0] != scales[1]:
        print(f"{flag} {name}: its scaling_factor is {vae['scaling_factor']}, the pipeline's VAE has {own['scaling_factor']}; latents of "
              "another VAE than the model was trained with give a worse model")  # fmt: skip
    return path


def vae_overflows(folder: Optional[Path], mixed_precision: str) -> bool:
    """Whether SDXL's VAE is to be computed in float32: the pipeline's own (`folder` None) always, another one in fp16 if it says so."""
    return folder is None or (mixed_precision == "fp16" and bool(read_config(folder.parent, folder.name)["force_upcast"]))


def resolve_tokenizer(name: str, flag: str, cache_dir: Optional[str]) -> Path:
    """The directory of a CLIP tokenizer (local, or from the hub). Raises UserError if it lacks a file."""
    path = Path(name)
    if not path.is_dir():
        path = _download(flag, name, None, cache_dir, ["*.json", "merges.txt"])
    path = path.resolve()
    if problems := _tokenizer_problems(path.parent, path.name, ("CLIPTokenizer",)):
        raise UserError(f"{flag} {name}: not a CLIP tokenizer:\n{listing(problems)}\nGive the directory of one.")
    return path


def resolve_controlnet(name: str, flag: str, cache_dir: Optional[str], base: dict, weights: bool = True) -> Path:
    """The directory of an existing ControlNet (local, or from the hub) that fits the model whose config is `base`.

    Raises UserError if it is neither, not whole, made for another width, or of a kind that is not trained: one that reads several
    kinds of conditions (union), or a condition of other than three channels.
    """
    cls, shared = CONTROLNETS[base["_class_name"]]
    path = resolve_part(name, flag, cache_dir, cls, weights)
    config, own = read_config(path.parent, path.name), config_defaults(cls)
    for key, what in (("num_mode", "union"), ("num_control_type", "union"), ("conditioning_embedding_channels", "pixels")):
        if config.get(key) is not None:
            kind = "a union ControlNet" if what == "union" else "a ControlNet that takes its condition as pixels, not as the VAE's latents,"
            raise UserError(f"{flag} {name}: {kind} ({key} {config[key]}) is not supported. Give one for a single condition.")
    if config.get("conditioning_channels", 3) != 3:
        raise UserError(
            f"{flag} {name}: conditioning_channels is {config['conditioning_channels']}, and a condition image has 3. "
            "Give a ControlNet that reads one RGB image."
        )
    for key in shared:
        if config.get(key, own.get(key)) != base.get(key):
            raise UserError(f"{flag} {name}: its {key} is {config.get(key)}, the base's {base.get(key)}. Give one made for this model.")
    if any(path.glob("*.safetensors")) and (
        union := [key for key in stored_tensors(path.parent, path.name) if key.startswith(UNION_TENSORS)]
    ):
        raise UserError(f"{flag} {name}: a union ControlNet (its file has {union[0]}) is not supported. Give one for a single condition.")
    return path


def _hub_files(flag: str, name: str, revision: Optional[str]) -> Optional[list[str]]:
    """The names of all files of a repository on the hub; None if the hub does not say."""
    _require_hub_name(flag, name)
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, revision=revision)
    except Exception:  # without a network the hub's cache on disk may do; the download says what is wrong
        return None


def _download(flag: str, name: str, revision: Optional[str], cache_dir: Optional[str], patterns: list[str]) -> Path:
    _require_hub_name(flag, name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # no network, no such repository, gated, wrong revision: the hub's text says which
        raise UserError(f"{flag} {name}: no such directory, and the hub says: {error}") from None


def _require_hub_name(flag: str, name: str) -> None:
    if Path(name).is_file():
        kind = "quantised weights in GGUF" if name.endswith(".gguf") else "a single file"
        raise UserError(
            f"{flag} {name}: {kind}. Give the directory of the model in the Hugging Face layout (model_index.json or config.json, and "
            ".safetensors files in bf16, fp16 or fp32), or its hub id."
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: no such directory. Give a local directory or a hub id.")


# ---- checking --------------------------------------------------------------------------------------------------------------------------


def check_pipeline(
    root: Path, components: dict, variant: Optional[str] = None, weights: bool = True, there: Optional[list[str]] = None
) -> None:
    """Every component is there, of a right class, its weights complete, and the whole is a model that the script can train.

    Reads configs and headers only; without `weights` only the configs of models are needed and looked at. `there` are the files of the
    repository on the hub, of which some were downloaded. Raises UserError naming all defects.
    """
    flag = "--pretrained_model_name_or_path"
    if problem := _pipeline_class_problem(root, components):
        raise UserError(f"{flag} {root}: {problem}.")
    broken = [] if not weights or (root / "model_index.json").is_file() else [_missing_index(root)]
    unsupported = []
    for name, classes in components.items():
        if weights or _is_model(name) or (root / config_file(name)).is_file():
            own = None if there is None else [file[len(name) + 1 :] for file in there if file.startswith(f"{name}/")]
            for found, more in zip((unsupported, broken), _part_problems(root, name, classes, variant, weights, own)):
                found += more
    if not broken and not unsupported:
        with from_files(root):
            unsupported = _model_problems(root, components)
    if unsupported:
        raise UserError(
            f"{flag} {root}: cannot be trained by this script:\n{listing(unsupported)}\ndocs/models.md says which published models can."
        )
    if variant and weights and not broken:
        _tell_variant(flag, root, [name for name in components if _is_model(name)], variant)
    if broken:
        raise UserError(
            f"{flag} {root}: not a whole pipeline:\n{listing(broken)}\n"
            "Copy or download it again, in the Hugging Face layout (model_index.json, transformer/, vae/, ...)."
        )


def _missing_index(root: Path) -> str:
    below = sorted([*root.glob("*/model_index.json"), *root.glob("snapshots/*/model_index.json")])
    return "model_index.json is missing" + (f"; there is a pipeline in {below[0].parent}: give that" if below else "")


def _is_model(name: str) -> bool:
    return not name.startswith(("tokenizer", "scheduler"))


def _tell_variant(flag: str, root: Path, names: list[str], variant: str) -> None:
    plain = [name for name in names if not has_variant(root, name, variant)]
    if len(plain) == len(names):
        raise UserError(f"{flag} {root}: no component has files of the variant {variant}. Leave --variant {variant} out.")
    if plain:
        print(f"--variant {variant}: {', '.join(plain)} has no files of that variant; the plain ones are used")


def _pipeline_class_problem(root: Path, components: dict) -> Optional[str]:
    """What is wrong with the class that model_index.json names. A class that is not known is left to the checks of the configs."""
    if not {"transformer", "unet"} & components.keys():
        return None
    expected = "Flux" if "transformer" in components else "StableDiffusionXL" if "text_encoder_2" in components else "StableDiffusion"
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
        return f"model_index.json: _class_name is {found}, {title}; " + (f"train it with {script}" if script else "it is not supported")
    return None


def _part_problems(
    root: Path, name: str, classes: tuple, variant: Optional[str], weights: bool, there: Optional[list[str]]
) -> tuple[list[str], list[str]]:
    """Of a component what the scripts cannot train, and what is missing or torn."""
    folder = root / name
    try:
        if not folder.is_dir():
            return [], [f"{name}/ is missing"]
        if name.startswith("tokenizer"):
            return [], _tokenizer_problems(root, name, classes)
        if not (root / config_file(name)).is_file():
            return [], [f"{config_file(name)} is missing"]
        config = read_config(root, name)
        found = class_of(config)
        if classes and found not in classes:
            hint = ", Flax weights: give the version with .safetensors files" if found.startswith("Flax") else ""
            return [f"{config_file(name)}: the class is {found}, expected {classes[0]}{hint}"], []
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            return [f"{config_file(name)}: quantization_config says {method}. {UNQUANTISED}"], []
        if nulls := _nulls(root, name):
            return [f"{config_file(name)}: {', '.join(nulls)}. Give the config.json that was published with the model"], []
        # A plan needs no weights. Where there are some, it is made for what a run would accept.
        if name == "scheduler" or not (weights or any(path.suffix in WEIGHTS for path in folder.iterdir())):
            return [], []
        return _weights_problems(root, name, variant, there)
    except (OSError, ValueError) as error:
        return [], [str(error)]


def _nulls(root: Path, name: str) -> list[str]:
    """Keys that have nothing where the class takes a number or several."""
    given = read_json(root, root / config_file(name))
    numbers = (int, float, tuple, list)
    defaults = config_defaults(class_of(given)) if "_class_name" in given else {}
    wrong = [key for key, value in given.items() if value is None and isinstance(defaults.get(key), numbers)]
    return [f"{key} is null, expected such as {defaults[key]}" for key in wrong if not isinstance(defaults[key], bool)]


UNQUANTISED = "Quantised weights are not trained on: download the model's own in bf16, fp16 or fp32 instead"


def _weights_problems(root: Path, name: str, variant: Optional[str], there: Optional[list[str]]) -> tuple[list[str], list[str]]:
    files = weight_files(root, name, variant)
    there = [path.name for path in (root / name).iterdir()] if there is None else there
    missing = [missing_file(name, path, there) for path in files if not path.is_file()]
    if torn := [problem for path in files if path.is_file() and (problem := file_problem(root, path))] + missing:
        return [], torn
    for key, tensor in stored_tensors(root, name, variant).items():
        if key.endswith(".weight") and tensor.kind in QUANTISED:
            return [f"{name}/{tensor.path.name}: {key} is {tensor.kind} ({QUANTISED[tensor.kind]}). {UNQUANTISED}"], []
    return [], []


def _tokenizer_problems(root: Path, name: str, classes: tuple) -> list[str]:
    folder, choices = root / name, TOKENIZER_FILES["CLIP" if classes[0].startswith("CLIP") else "T5"]
    missing = [[file for file in ("tokenizer_config.json", *choice) if not (folder / file).is_file()] for choice in choices]
    if all(missing):
        return [f"{name}/{file} is missing" for file in missing[-1]]
    for path in sorted(folder.glob("*.json")):
        read_json(root, path)
    for path in [folder / file for file in ("merges.txt", "spiece.model") if (folder / file).is_file()]:
        if is_pointer(path):
            return [f"{name}/{path.name} {POINTER}"]
        if path.suffix == ".txt" and not any(line and not line.startswith("#") for line in path.read_text(encoding="utf-8").split("\n")):
            return [f"{name}/{path.name} has no merges"]
    index = root / "model_index.json"
    entry = read_json(root, index).get(name) if index.is_file() else None  # its absence is told once
    found = entry[1] if isinstance(entry, list) and len(entry) > 1 else None
    return [] if found in (None, *classes) else [f"model_index.json: {name} is a {found}, expected {classes[0]}"]


# ---- what is trained -------------------------------------------------------------------------------------------------------------------


def _model_problems(root: Path, components: dict) -> list[str]:
    """What configs say that the scripts do not compute, or that does not go together."""
    configs = {name: read_config(root, name) for name in components if (root / config_file(name)).is_file()}
    base = "transformer" if "transformer" in components else "unet"
    problems = _scheduler_problems(configs["scheduler"], base) if "scheduler" in configs else []
    if "vae" in configs:
        problems += _vae_problems(root, "vae")
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
            yield "out_channels", config["out_channels"], channels, ": it does not predict noise. Give the text-to-image model"
    for key, wanted in ONLY.get(base, {}).items():
        yield key, config.get(key), wanted, ", and nothing else is computed here. Give another model"
    if flux:
        dims = config["axes_dims_rope"]
        yield "the sum of axes_dims_rope", sum(dims), config["attention_head_dim"], ", which is attention_head_dim"
        if second:
            yield "joint_attention_dim", config["joint_attention_dim"], second["d_model"], ", the width of text_encoder_2"
        if clip:
            yield "pooled_projection_dim", config["pooled_projection_dim"], clip["hidden_size"], ", the width of text_encoder"
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
        yield key, config[key], width, ": it reads other sizes than height, width and crop. Give a base model, not a refiner"


def _scheduler_problems(scheduler: dict, base: str) -> list[str]:
    file, cls = "scheduler/scheduler_config.json", class_of(scheduler)
    if not (isinstance(scheduler.get("num_train_timesteps", 1000), int) and scheduler.get("num_train_timesteps", 1000) >= 1):
        return [f"{file}: num_train_timesteps is {scheduler['num_train_timesteps']}, expected a number such as 1000"]
    if base == "transformer":
        wrong = [key for key in ("shift", "base_shift", "max_shift") if not _number(scheduler[key])]
        wrong += [key for key in ("base_image_seq_len", "max_image_seq_len") if not _number(scheduler[key])]
        if wrong:
            return [f"{file}: {key} is {scheduler[key]}, expected a number. Give FLUX.1-dev's scheduler_config.json" for key in wrong]
        if scheduler["base_image_seq_len"] >= scheduler["max_image_seq_len"]:
            return [f"{file}: base_image_seq_len is {scheduler['base_image_seq_len']}, expected less than max_image_seq_len"]
        only = ONLY["FlowMatchEulerDiscreteScheduler"]
        return [
            f"{file}: {key} is {scheduler[key]}, and only {value} is computed here. Give FLUX.1-dev's scheduler_config.json"
            for key, value in only.items()
            if (scheduler.get(key) if scheduler.get(key) is not None else value) != value
        ]
    if lacking := [key for key in ("beta_start", "beta_end", "beta_schedule") if key not in scheduler]:
        edm = ", which was trained with EDM's noise" if "sigma_data" in scheduler else ""
        return [f"{file}: {cls} has no {', '.join(lacking)}{edm}. Models with such noise are not supported; give one with betas"]
    try:
        diffusion.alphas_cumprod(scheduler), diffusion.prediction_type(scheduler)
    except UserError as error:
        return [str(error)]
    return []


def _vae_problems(root: Path, name: str) -> list[str]:
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
    return [f"{name}/config.json: {problem}; expected latents_mean and latents_std of latent_channels numbers each" for problem in wrong]


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_number, value))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
