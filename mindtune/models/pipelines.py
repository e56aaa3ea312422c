"""Finding a pipeline or one of its parts, and checking from configs and headers alone whether a script can train with it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Optional

from mindtune.cli import UserError, indented_list
from mindtune.models.configs import class_of, config_file, from_files, read_config
from mindtune.models.library import config_defaults
from mindtune.models.supported import class_problem, model_problems, vae_problems
from mindtune.models.weights import (
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
# The ControlNet that belongs to a model, and what both have to agree on.
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
UNION_TENSORS = ("task_embedding", "control_add_embedding", "controlnet_mode_embedder", "spatial_ch_projs")
# What `load_tokenizer` can read: any one of these sets of files.
TOKENIZER_FILES = {"CLIP": (("vocab.json", "merges.txt"),), "T5": (("tokenizer.json",), ("spiece.model",))}
WEIGHTS = (".safetensors", *PICKLED, *FOREIGN)  # endings of files that hold some
QUANTISED = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "U8": "packed 4-bit or 8-bit", "I8": "8-bit integer"}


# ---- finding -------------------------------------------------------------------------------------


def resolve_pipeline(
    name: str,
    revision: Optional[str],
    variant: Optional[str],
    cache_dir: Optional[str],
    components: dict,
    weights: bool = True,
) -> Path:
    """A local directory as it is, anything else from the hub; then checks it. Without `weights` only the configs need to be there.

    From the hub come only the files of the named components: configs, tokenizers, and safetensors of the variant, or plain ones where
    a component has none of the variant. Raises UserError if it is neither, not whole, or not what the script trains (`check_pipeline`).
    """
    flag, root, there = "--pretrained_model_name_or_path", Path(name), None
    if not root.is_dir():
        there, patterns = _hub_files(flag, name, revision), ["model_index.json"]
        for part in components:
            patterns += [
                f"{part}/{kind}" for kind in (("*.json", "*.txt", "*.model") if weights else ("*config.json",))
            ]
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
        path = _download(
            flag, name, None, cache_dir, ["config.json", "*.index.json", *(file_patterns("") if weights else [])]
        )
    path = path.resolve()  # "." has no name
    unsupported, broken = _part_problems(path.parent, path.name, (cls,), None, weights, there)
    if unsupported:
        raise UserError(
            f"{flag} {name}: cannot be used:\n{indented_list(unsupported)}\ndocs/models.md says which published models can."
        )
    broken = [
        re.sub(r": add --variant .*", ": rename them without it, which is how they are read", line) for line in broken
    ]
    if broken:
        raise UserError(f"{flag} {name}: not a whole {cls}:\n{indented_list(broken)}\nCopy or download it again.")
    return path


def resolve_vae(name: str, flag: str, cache_dir: Optional[str], root: Path, base: str, weights: bool = True) -> Path:
    """The directory of a VAE that stands in for the pipeline's. Raises UserError if it is not whole or of another width."""
    path = resolve_part(name, flag, cache_dir, "AutoencoderKL", weights)
    vae, model = read_config(path.parent, path.name), read_config(root, base)
    own = read_config(root, "vae")
    if vae["latent_channels"] != model["in_channels"]:
        raise UserError(f"{flag} {name}: latent_channels is {vae['latent_channels']}, the {base} reads {model['in_channels']}. "
                        "Give a VAE made for this model.")  # fmt: skip
    if problems := vae_problems(path.parent, path.name):
        raise UserError(
            f"{flag} {name}: cannot be used:\n{indented_list(problems)}\nGive the config.json that was published with it."
        )
    scales = [(config["scaling_factor"], config["latents_mean"], config["latents_std"]) for config in (own, vae)]
    if scales[0] != scales[1]:
        print(f"{flag} {name}: its scaling_factor is {vae['scaling_factor']}, the pipeline's VAE has {own['scaling_factor']}; latents of "
              "another VAE than the model was trained with give a worse model")  # fmt: skip
    return path


def vae_overflows(folder: Optional[Path], mixed_precision: str) -> bool:
    """Whether SDXL's VAE is to be computed in float32: the pipeline's own (`folder` None) always, another one in fp16 if it says so."""
    return folder is None or (
        mixed_precision == "fp16" and bool(read_config(folder.parent, folder.name)["force_upcast"])
    )


def resolve_tokenizer(name: str, flag: str, cache_dir: Optional[str]) -> Path:
    """The directory of a CLIP tokenizer (local, or from the hub). Raises UserError if it lacks a file."""
    path = Path(name)
    if not path.is_dir():
        path = _download(flag, name, None, cache_dir, ["*.json", "merges.txt"])
    path = path.resolve()
    if problems := _tokenizer_problems(path.parent, path.name, ("CLIPTokenizer",)):
        raise UserError(f"{flag} {name}: not a CLIP tokenizer:\n{indented_list(problems)}\nGive the directory of one.")
    return path


def resolve_controlnet(name: str, flag: str, cache_dir: Optional[str], base: dict, weights: bool = True) -> Path:
    """The directory of an existing ControlNet (local, or from the hub) that fits the model whose config is `base`.

    Raises UserError if it is neither, not whole, made for another width, or of a kind that is not trained: one that reads several
    kinds of conditions (union), or a condition of other than three channels.
    """
    cls, shared = CONTROLNETS[base["_class_name"]]
    path = resolve_part(name, flag, cache_dir, cls, weights)
    config, own = read_config(path.parent, path.name), config_defaults(cls)
    for key, what in (
        ("num_mode", "union"),
        ("num_control_type", "union"),
        ("conditioning_embedding_channels", "pixels"),
    ):
        if config.get(key) is not None:
            kind = (
                "a union ControlNet"
                if what == "union"
                else "a ControlNet that takes its condition as pixels, not as the VAE's latents,"
            )
            raise UserError(
                f"{flag} {name}: {kind} ({key} {config[key]}) is not supported. Give one for a single condition."
            )
    if config.get("conditioning_channels", 3) != 3:
        raise UserError(
            f"{flag} {name}: conditioning_channels is {config['conditioning_channels']}, and a condition image has 3. "
            "Give a ControlNet that reads one RGB image."
        )
    for key in shared:
        if config.get(key, own.get(key)) != base.get(key):
            raise UserError(
                f"{flag} {name}: its {key} is {config.get(key)}, the base's {base.get(key)}. Give one made for this model."
            )
    if any(path.glob("*.safetensors")) and (
        union := [key for key in stored_tensors(path.parent, path.name) if key.startswith(UNION_TENSORS)]
    ):
        raise UserError(
            f"{flag} {name}: a union ControlNet (its file has {union[0]}) is not supported. Give one for a single condition."
        )
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


# ---- checking ------------------------------------------------------------------------------------


def check_pipeline(
    root: Path, components: dict, variant: Optional[str] = None, weights: bool = True, there: Optional[list[str]] = None
) -> None:
    """Every component is there, of a right class, its weights complete, and the whole is a model that the script can train.

    Reads configs and headers only; without `weights` only the configs of models are needed and looked at. `there` are the files of the
    repository on the hub, of which some were downloaded. Raises UserError naming all defects.
    """
    flag = "--pretrained_model_name_or_path"
    if problem := class_problem(root, components):
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
            unsupported = model_problems(root, components)
    if unsupported:
        raise UserError(
            f"{flag} {root}: cannot be trained by this script:\n{indented_list(unsupported)}\ndocs/models.md says which published models can."
        )
    if variant and weights and not broken:
        _tell_variant(flag, root, [name for name in components if _is_model(name)], variant)
    if broken:
        raise UserError(
            f"{flag} {root}: not a whole pipeline:\n{indented_list(broken)}\n"
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
        raise UserError(
            f"{flag} {root}: no component has files of the variant {variant}. Leave --variant {variant} out."
        )
    if plain:
        print(f"--variant {variant}: {', '.join(plain)} has no files of that variant; the plain ones are used")


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
            return [
                f"{config_file(name)}: {', '.join(nulls)}. Give the config.json that was published with the model"
            ], []
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


def _weights_problems(
    root: Path, name: str, variant: Optional[str], there: Optional[list[str]]
) -> tuple[list[str], list[str]]:
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
    missing = [
        [file for file in ("tokenizer_config.json", *choice) if not (folder / file).is_file()] for choice in choices
    ]
    if all(missing):
        return [f"{name}/{file} is missing" for file in missing[-1]]
    for path in sorted(folder.glob("*.json")):
        read_json(root, path)
    for path in [folder / file for file in ("merges.txt", "spiece.model") if (folder / file).is_file()]:
        if is_pointer(path):
            return [f"{name}/{path.name} {POINTER}"]
        if path.suffix == ".txt" and not any(
            line and not line.startswith("#") for line in path.read_text(encoding="utf-8").split("\n")
        ):
            return [f"{name}/{path.name} has no merges"]
    index = root / "model_index.json"
    entry = read_json(root, index).get(name) if index.is_file() else None  # its absence is told once
    found = entry[1] if isinstance(entry, list) and len(entry) > 1 else None
    return [] if found in (None, *classes) else [f"model_index.json: {name} is a {found}, expected {classes[0]}"]
