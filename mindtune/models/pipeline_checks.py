"""Checks from configs and file headers alone whether a pipeline is complete and can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from mindtune.cli import UserError, indented_list
from mindtune.models.configs import class_of, config_file, convert_errors, read_config
from mindtune.models.library import config_defaults
from mindtune.models.supported import class_problem, model_problems
from mindtune.models.weights import (
    LFS_POINTER,
    PICKLED,
    UNSUPPORTED,
    file_problem,
    has_variant,
    is_lfs_pointer,
    missing_file_problem,
    read_json,
    stored_tensors,
    weight_files,
)

# The files that `load_tokenizer` needs: any one of these sets.
TOKENIZER_FILES = {"CLIP": (("vocab.json", "merges.txt"),), "T5": (("tokenizer.json",), ("spiece.model",))}
WEIGHT_ENDINGS = (".safetensors", *PICKLED, *UNSUPPORTED)
QUANTISED = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "U8": "packed 4-bit or 8-bit", "I8": "8-bit integer"}
NOT_QUANTISED = (
    "Quantised weights cannot be trained: download the model's original weights in bf16, fp16 or fp32 instead"
)


class Problems(NamedTuple):
    """`unsupported`: what the scripts cannot train. `broken`: what is missing or damaged."""

    unsupported: list[str]
    broken: list[str]


def check_pipeline(
    root: Path,
    components: dict,
    variant: Optional[str] = None,
    weights: bool = True,
    hub_files: Optional[list[str]] = None,
    task: str = "text-to-image",
) -> None:
    """Raises UserError with every problem unless the pipeline is complete and can be trained.

    `components` maps every needed component to its supported classes. Reads only configs and headers; without `weights`
    only the configs of models are needed. `hub_files` are all files of the repository on the hub, of which only some
    were downloaded. `task` is a key of `supported.TASKS`.
    """
    flag = "--pretrained_model_name_or_path"
    if problem := class_problem(root, components, task):
        raise UserError(f"{flag} {root}: {problem}.")
    unsupported = []
    broken = [] if not weights or (root / "model_index.json").is_file() else [_missing_index(root)]
    for name, classes in components.items():
        if weights or _is_model(name) or (root / config_file(name)).is_file():
            prefix = f"{name}/"
            existing = hub_files and [file[len(prefix) :] for file in hub_files if file.startswith(prefix)]
            problems = component_problems(root, name, classes, variant, weights, existing)
            unsupported += problems.unsupported
            broken += problems.broken
    if not broken and not unsupported:
        with convert_errors(root):
            unsupported = model_problems(root, components, task)
    if unsupported:
        raise UserError(
            f"{flag} {root}: cannot be trained by this script:\n{indented_list(unsupported)}\n"
            "docs/models.md lists the published models that can."
        )
    if variant and weights and not broken:
        _report_variant(flag, root, [name for name in components if _is_model(name)], variant)
    if broken:
        raise UserError(
            f"{flag} {root}: not a complete pipeline:\n{indented_list(broken)}\n"
            "Copy or download it again, in the Hugging Face layout (model_index.json, transformer/, vae/, ...)."
        )


def _missing_index(root: Path) -> str:
    nested = sorted([*root.glob("*/model_index.json"), *root.glob("snapshots/*/model_index.json")])
    advice = f"; there is a pipeline in {nested[0].parent}: give that directory" if nested else ""
    return "model_index.json is missing" + advice


def _is_model(name: str) -> bool:
    return not name.startswith(("tokenizer", "scheduler"))


def _report_variant(flag: str, root: Path, names: list[str], variant: str) -> None:
    """Prints which components have no files of the variant; raises UserError if none has."""
    plain = [name for name in names if not has_variant(root, name, variant)]
    if len(plain) == len(names):
        raise UserError(f"{flag} {root}: no component has files of the variant {variant}. Remove --variant {variant}.")
    if plain:
        print(f"--variant {variant}: {', '.join(plain)} has no files of that variant; uses the files without a variant")


def component_problems(
    root: Path, name: str, classes: tuple, variant: Optional[str], weights: bool, existing: Optional[list[str]]
) -> Problems:
    """Describes every problem of one component; see `check_pipeline`.

    `existing`: its files on the hub, None if local.
    """
    folder, file = root / name, config_file(name)
    try:
        if not folder.is_dir():
            return Problems([], [f"{name}/ is missing"])
        if name.startswith("tokenizer"):
            return Problems([], tokenizer_problems(root, name, classes))
        if not (root / file).is_file():
            return Problems([], [f"{file} is missing"])
        if problem := _config_problem(root, name, classes):
            return Problems([f"{file}: {problem}"], [])
        # A memory plan needs no weights, but it checks existing ones so that it agrees with a run.
        has_weights = weights or any(path.suffix in WEIGHT_ENDINGS for path in folder.iterdir())
        if name == "scheduler" or not has_weights:
            return Problems([], [])
        return _weights_problems(root, name, variant, existing)
    except (OSError, ValueError) as error:
        return Problems([], [str(error)])


def _config_problem(root: Path, name: str, classes: tuple) -> Optional[str]:
    """Describes an unsupported class, quantised weights, or nulls in a component's config; None if there are none."""
    config = read_config(root, name)
    cls = class_of(config)
    if classes and cls not in classes:
        hint = ", Flax weights: give the version with .safetensors files" if cls.startswith("Flax") else ""
        return f"the class is {cls}, expected {classes[0]}{hint}"
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        return f"quantization_config says {method}. {NOT_QUANTISED}"
    if nulls := _nulls(root, name):
        return f"{', '.join(nulls)}. Give the config.json that was published with the model"
    return None


def _nulls(root: Path, name: str) -> list[str]:
    """Keys that are null although the class expects a number or a list of numbers."""
    config = read_json(root, root / config_file(name))
    defaults = config_defaults(class_of(config)) if "_class_name" in config else {}
    numbers = (int, float, tuple, list)
    wrong = [key for key, value in config.items() if value is None and isinstance(defaults.get(key), numbers)]
    return [f"{key} is null, expected such as {defaults[key]}" for key in wrong if not isinstance(defaults[key], bool)]


def _weights_problems(root: Path, name: str, variant: Optional[str], existing: Optional[list[str]]) -> Problems:
    files = weight_files(root, name, variant)
    existing = [path.name for path in (root / name).iterdir()] if existing is None else existing
    broken = [problem for path in files if path.is_file() and (problem := file_problem(root, path))]
    broken += [missing_file_problem(name, path, existing) for path in files if not path.is_file()]
    if broken:
        return Problems([], broken)
    for key, tensor in stored_tensors(root, name, variant).items():
        if key.endswith(".weight") and tensor.dtype in QUANTISED:
            dtype = f"{tensor.dtype} ({QUANTISED[tensor.dtype]})"
            return Problems([f"{name}/{tensor.path.name}: {key} is {dtype}. {NOT_QUANTISED}"], [])
    return Problems([], [])


def tokenizer_problems(root: Path, name: str, classes: tuple) -> list[str]:
    """Describes missing or damaged files of a tokenizer, or its wrong class in model_index.json."""
    folder, choices = root / name, TOKENIZER_FILES["CLIP" if classes[0].startswith("CLIP") else "T5"]
    missing = [
        [file for file in ("tokenizer_config.json", *choice) if not (folder / file).is_file()] for choice in choices
    ]
    if all(missing):
        return [f"{name}/{file} is missing" for file in missing[-1]]
    for path in sorted(folder.glob("*.json")):
        read_json(root, path)
    for path in [folder / file for file in ("merges.txt", "spiece.model") if (folder / file).is_file()]:
        if is_lfs_pointer(path):
            return [f"{name}/{path.name} {LFS_POINTER}"]
        if path.suffix == ".txt" and not _has_merges(path):
            return [f"{name}/{path.name} has no merges"]
    index = root / "model_index.json"
    entry = read_json(root, index).get(name) if index.is_file() else None  # a missing index is reported elsewhere
    cls = entry[1] if isinstance(entry, list) and len(entry) > 1 else None
    return [] if cls in (None, *classes) else [f"model_index.json: {name} is a {cls}, expected {classes[0]}"]


def _has_merges(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").split("\n")
    return any(line and not line.startswith("#") for line in lines)
