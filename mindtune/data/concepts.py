"""What a LoRA learns: one folder or data set of images that flags name, or several that a TOML file names."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from mindtune.cli import UserError, printable
from mindtune.data import buckets, captions, checks, columns, folders, tables
from mindtune.data.image_facts import ImageFacts
from mindtune.data.image_sample import TRANSPARENCY, Sample
from mindtune.files import file_digest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Concept(NamedTuple):
    """A folder or a data set of images, with how they are used.

    The fields are flags of the LoRA script, and keys of a table [[concept]] in the file of --dataset_config. Only
    `weight`, the factor of the loss, is no flag, and only `cache_dir` and `hub` are no keys. Each image is used
    `repeats` times per epoch. A prompt is the caption of images without one.
    """

    instance_data_dir: Optional[str] = None
    dataset_name: Optional[str] = None
    dataset_config_name: Optional[str] = None
    image_column: Optional[str] = None
    caption_column: Optional[str] = None
    instance_prompt: Optional[str] = None
    max_train_samples: Optional[int] = None
    repeats: int = 1
    weight: float = 1.0
    center_crop: bool = False
    random_flip: bool = False
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_orders: int = 8
    trigger_word: Optional[str] = None
    masked_loss: bool = False
    mask_column: Optional[str] = None
    unmasked_weight: float = 0.0
    class_data_dir: Optional[str] = None
    class_prompt: Optional[str] = None
    num_class_images: int = 100
    cache_dir: Optional[str] = None
    hub: str = "huggingface"

    @property
    def source(self) -> str:
        """The flag and its value that name the images."""
        if self.dataset_name:
            return f"--dataset_name {printable(self.dataset_name)}"
        return f"--instance_data_dir {printable(self.instance_data_dir)}"


NO_KEYS = ("cache_dir", "hub")
TYPES = {
    **dict.fromkeys(("repeats", "max_train_samples", "num_class_images", "keep_tags", "tag_orders"), int),
    **dict.fromkeys(("weight", "caption_dropout", "unmasked_weight"), float),
    **dict.fromkeys(("center_crop", "random_flip", "shuffle_tags", "masked_loss"), bool),
}
PATHS = ("instance_data_dir", "class_data_dir", "dataset_name")
FROM_ZERO = ("keep_tags", "caption_dropout", "unmasked_weight")
BELOW_ONE = ("caption_dropout", "unmasked_weight")
DESCRIPTIONS: dict[Any, str] = {
    int: "a whole number of 1 or more",
    float: "a number above 0",
    bool: "true or false",
    str: "text",
    "keep_tags": "a whole number of 0 or more",
    "tag_orders": "a whole number of 2 or more",
    **dict.fromkeys(BELOW_ONE, "a number from 0 to below 1"),
}


# ---- the file ------------------------------------------------------------------------------------


def read(path: str, defaults: Concept) -> list[Concept]:
    """The concepts of a file of --dataset_config. A key that is left out has the value of `defaults`, the flags.

    Paths are relative to the file. Raises UserError that names the file, the concept and the key.
    """
    flag = f"--dataset_config {path}"
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror}). Give a TOML file.") from None
    except ValueError as error:  # TOML, or UTF-8
        raise UserError(f"{flag}: is not TOML: {error}.") from None
    tables = content.pop("concept", None)
    if content or not isinstance(tables, list) or not tables or not all(isinstance(each, dict) for each in tables):
        unknown = f"has {', '.join(content)}; it" if content else "it"
        raise UserError(
            f"{flag}: {unknown} must have tables [[concept]], one per folder or data set, and nothing else."
        )
    found = [
        _concept(values, defaults, Path(path).parent, f"{flag}, concept {number}")
        for number, values in enumerate(tables, 1)
    ]
    prompts: dict[str, Optional[str]] = {}
    for concept in found:
        if concept.class_data_dir and prompts.setdefault(concept.class_data_dir, concept.class_prompt) != (
            concept.class_prompt
        ):
            raise UserError(f"{flag}: class_data_dir {concept.class_data_dir} has two class prompts. Use two folders.")
    return found


def digest(path: Optional[str]) -> Optional[str]:
    """A hash of a file of --dataset_config; None without one."""
    return file_digest(Path(path)) if path else None


def _concept(values: dict[str, Any], defaults: Concept, folder: Path, where: str) -> Concept:
    keys = [name for name in Concept._fields if name not in NO_KEYS]
    for key, value in values.items():
        if key not in keys:
            raise UserError(f"{where}: {key} is no key. There are {', '.join(keys)}.")
        _check_value(key, value, where)
    if ("instance_data_dir" in values) == ("dataset_name" in values):
        raise UserError(f"{where}: give either instance_data_dir or dataset_name.")
    _check_effect(values, defaults, where)
    if ("class_data_dir" in values) != ("class_prompt" in values):
        raise UserError(f"{where}: class_data_dir and class_prompt belong together. Give both, or none.")
    paths = {key: folder / Path(values[key]).expanduser() for key in PATHS if key in values}
    if "dataset_name" in paths and not paths["dataset_name"].is_dir():
        del paths["dataset_name"]  # an id on the hub
    values = {**values, **{key: str(path) for key, path in paths.items()}}
    return defaults._replace(**values)


def _check_effect(values: dict[str, Any], defaults: Concept, where: str) -> None:
    """Raises UserError for a key that needs another one."""
    needed = {"keep_tags": "shuffle_tags", "tag_orders": "shuffle_tags"}
    needed.update(unmasked_weight="masked_loss", mask_column="masked_loss")
    for key, other in needed.items():
        if key in values and not values.get(other, getattr(defaults, other)):
            raise UserError(f"{where}: {key}: needs {other} = true. Add it, or leave {key} out.")
    for key in ("image_column", "mask_column", "dataset_config_name"):
        if key in values and "instance_data_dir" in values:
            raise UserError(f"{where}: {key}: needs dataset_name. Leave it out.")


def _check_value(key: str, value: Any, where: str) -> None:
    kind = TYPES.get(key, str)
    expected = DESCRIPTIONS.get(key, DESCRIPTIONS[kind])
    if kind in (int, float):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_right = is_number and (kind is float or isinstance(value, int)) and 0 <= value < math.inf
        is_right = (
            is_right
            and (value > 1 or key != "tag_orders")
            and (value > 0 or key in FROM_ZERO)
            and (value < 1 or key not in BELOW_ONE)
        )
    else:
        is_right = type(value) is kind and value != ""
    if not is_right:
        raise UserError(f"{where}: {key} = {value!r}: must be {expected}.")


# ---- images --------------------------------------------------------------------------------------


def find_samples(concepts: Sequence[Concept]) -> list[Sample]:
    """The images of all concepts with their captions, for a plan: none is opened or downloaded. Raises UserError."""
    for concept in concepts:
        if concept.dataset_name and not Path(concept.dataset_name).expanduser().is_dir():
            raise UserError(f"{concept.source}: is no directory, and a plan downloads nothing")
    return [sample for concept in concepts for sample in _find(concept)]


def _find(concept: Concept, say: Callable[[str], None] = print) -> list[Sample]:
    if concept.dataset_name:
        source = columns.Source(
            **{name: getattr(concept, name) for name in columns.Source._fields if hasattr(concept, name)},
            conditioning_image_column=concept.mask_column,
        )
        samples = tables.samples_in_dataset(source)
    else:
        samples = folders.samples_in_folder(concept.instance_data_dir, "--instance_data_dir", concept.caption_column)
    samples = samples[: concept.max_train_samples]
    with_mask = sum(sample.mask is not None for sample in samples)
    if with_mask and not concept.masked_loss:
        say(f"{concept.source}: {with_mask} masks are not used without --masked_loss")
    elif concept.masked_loss and with_mask < len(samples):
        without = f"{len(samples) - with_mask} of {len(samples)} images have no mask file"
        say(f"{concept.source}: {without}: their transparency is the mask, and opaque ones count whole")
    for sample in samples:
        sample.mask = (sample.mask or TRANSPARENCY) if concept.masked_loss else None
        caption = concept.instance_prompt if sample.caption is None else sample.caption
        sample.caption = captions.with_trigger_word(caption, concept.trigger_word)
        sample.concept = concept
    return samples


def load(
    concepts: Sequence[Concept],
    min_size: buckets.MinSize,
    facts: ImageFacts,
    skip_bad: bool,
    threads: int,
    class_images: bool = False,
) -> list[Sample]:
    """The usable images of all concepts, after decoding those not in `facts`. Prints a table if there are several.

    `min_size`, `skip_bad` and `threads` as in `checks.preflight`. Without `class_images`, those of the
    concepts are not used. Raises UserError.
    """
    if not class_images and any(concept.class_data_dir for concept in concepts):
        print("class_data_dir and class_prompt have no effect without --with_prior_preservation")
        concepts = [concept._replace(class_data_dir=None) for concept in concepts]
    found = []
    for concept in concepts:
        samples = checks.preflight(_find(concept), min_size, concept.source, skip_bad, threads, facts)
        uncaptioned = [sample.name for sample in samples if sample.caption is None]
        if uncaptioned:
            raise UserError(
                f"{len(uncaptioned)} images have no caption ({uncaptioned[0]} ...): give --instance_prompt, or a .txt "
                "file per image."
            )
        found.append(samples)
    if len(concepts) > 1:
        print(describe(concepts, list(map(len, found))))
    return [sample for samples in found for sample in samples]


def describe(concepts: Sequence[Concept], counts: list[int]) -> str:
    """A table with a line per concept; `counts` are the numbers of usable images."""
    rows = [("concept", "images", "repeats", "weight", "crop", "flip", "class images", "prompt")]
    for concept, count in zip(concepts, counts):
        rows.append(
            (
                printable(concept.instance_data_dir or concept.dataset_name),
                str(count),
                str(concept.repeats),
                f"{concept.weight:g}",
                "center" if concept.center_crop else "random",
                "random" if concept.random_flip else "no",
                str(concept.num_class_images) if concept.class_data_dir else "none",
                printable(concept.instance_prompt or "captions only"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)
