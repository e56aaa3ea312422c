"""Where the rows of a data set come from, and which of their columns hold the image, the condition and the caption."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mindtune.cli import UserError


class Columns(NamedTuple):
    """The names of the three columns of a data set; None for a column that is not used.

    In a data set of images instead of pairs, `condition` is the column of their masks.
    """

    image: Optional[str] = None
    condition: Optional[str] = None
    caption: Optional[str] = None


class Source(NamedTuple):
    """Where the rows come from. The fields are named like the flags of the scripts.

    Exactly one of `dataset_name`, `train_data_dir` and `jsonl_for_train` is set. `condition_optional` is no flag: pairs
    may lack a condition, because their row or the whole data set has none.
    """

    dataset_name: Optional[str] = None
    dataset_config_name: Optional[str] = None
    train_data_dir: Optional[str] = None
    jsonl_for_train: Optional[str] = None
    cache_dir: Optional[str] = None
    image_column: Optional[str] = None
    conditioning_image_column: Optional[str] = None
    caption_column: Optional[str] = None
    hub: str = "huggingface"
    condition_optional: bool = False

    @property
    def name(self) -> str:
        """The value of the flag that names the data set."""
        return self.jsonl_for_train or self.train_data_dir or self.dataset_name

    @property
    def flag(self) -> str:
        """The flag that names the data set."""
        if self.jsonl_for_train:
            return "--jsonl_for_train"
        return "--train_data_dir" if self.train_data_dir else "--dataset_name"

    @property
    def root(self) -> Optional[str]:
        """The directory that relative paths in cells start from; None if the data set is a file or a hub id."""
        root = Path(self.name).expanduser()
        return str(root) if root.is_dir() else None


def check_source(source: Source) -> None:
    """Raises UserError for no or several data sets, for --dataset_config_name without --dataset_name, and as below."""
    names = ("dataset_name", "train_data_dir", "jsonl_for_train")
    given = [f"--{name}" for name in names if getattr(source, name)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(f"give one of --dataset_name, --train_data_dir and --jsonl_for_train, not {found}.")
    if source.dataset_config_name and not source.dataset_name:
        raise UserError(
            f"--dataset_config_name {source.dataset_config_name}: needs --dataset_name. Add that, or leave it out."
        )
    check_hub(source.dataset_name, source.hub)


def check_hub(dataset_name: Optional[str], hub: str) -> None:
    """Raises UserError for the id of a data set on ModelScope: the datasets library reads Hugging Face's hub only."""
    if dataset_name and hub == "modelscope" and not Path(dataset_name).expanduser().is_dir():
        raise UserError(
            f"--dataset_name {dataset_name}: is no directory, and ids of data sets are not read from ModelScope. "
            f"Download it with `modelscope download --dataset {dataset_name} --local_dir DIR` and give --dataset_name "
            "DIR."
        )


COLUMN_FLAGS = Columns("--image_column", "--conditioning_image_column", "--caption_column")
# The `datasets` library gives folders without metadata the columns image, label or text, which are not what the user
# meant.
PAIRS_HINT = (
    " To name pairs of files, write metadata.jsonl with lines like "
    '{"file_name": ..., "conditioning_image_file_name": ..., "text": ...}.'
)
IMAGES_HINT = " Give a folder of images with caption files as --instance_data_dir."
# The columns that the rows of a .jsonl or .csv file are given, whatever their keys.
JSON_COLUMNS = Columns("image", "conditioning_image", "text")
IMAGE_COLUMN_NAMES = ("image", "jpg", "png", "jpeg", "webp", "heic", "heif", "avif")
CAPTION_COLUMN_NAMES = ("text", "txt", "caption", "prompt")
TEXT_TYPES = ("string", "large_string", "string_view")
IMAGE_TYPES = (*TEXT_TYPES, "binary", "large_binary", "Image")


def find_columns(
    features: dict, asked: Columns, where: str, single: bool = False, condition_optional: bool = False
) -> Columns:
    """The columns of image, condition and caption: those in `asked`, or else the columns with the usual names.

    `features` maps each column to its feature type, or to None if the type is unknown. `single`: the data set holds
    images instead of pairs, and captions are used only if they are asked for. `condition_optional`: the column of
    conditions is None if no column has a usual name. `where` starts the messages. Raises UserError that lists the
    columns of the data set if one is missing or holds something else.
    """
    flags = COLUMN_FLAGS._replace(condition="--mask_column") if single else COLUMN_FLAGS
    there = f"{where} has the columns {', '.join(features)}"
    for flag, column in zip(flags, asked):
        if column and column not in features:
            raise UserError(f"{flag} {column}: {there}. Name one of them.")
    found = _find_single_columns(features, asked) if single else _find_pair_columns(features, asked)
    unneeded = (flags.condition, flags.caption) if single else (flags.condition,) * condition_optional
    for flag, column, what in zip(flags, found, ("images", "images", "text")):
        if column is None and flag in unneeded:
            continue
        if column is None:
            is_plain_folder = set(features) <= {"image", "label", "text"}
            hint = (IMAGES_HINT if single else PAIRS_HINT) if is_plain_folder else ""
            raise UserError(f"{flag}: {there}; none has a known name. Name the one to use with {flag}.{hint}")
        type_name = _type_name(features[column])
        if type_name == "null" and condition_optional and flag == flags.condition:  # all cells are empty
            continue
        if type_name and type_name not in (IMAGE_TYPES if what == "images" else TEXT_TYPES):
            raise UserError(f"{flag} {column}: holds {type_name}, not {what}. {there}. Name another with {flag}.")
    return found


def no_condition(features: Iterable[str], where: str) -> str:
    """The line about a data set of pairs in which no column of conditions was found, although some may be meant."""
    return (
        f"{where}: has the columns {', '.join(features)}; none is known to hold conditions, so no pair has one. Name "
        f"one with {COLUMN_FLAGS.condition} if the pairs have conditions"
    )


def _find_single_columns(features: dict, asked: Columns) -> Columns:
    others = {column: feature for column, feature in features.items() if column != asked.condition}
    typed = _columns_of_images(others)
    image = asked.image or _first_match(typed or others, IMAGE_COLUMN_NAMES, ("image.",)) or next(iter(typed), None)
    return Columns(image, asked.condition, asked.caption)


def _find_pair_columns(features: dict, asked: Columns) -> Columns:
    others = [column for column in features if column != asked.image]
    condition = asked.condition or _first_match(others, ("conditioning_image",), ("conditioning.", "condition"))
    others = [column for column in features if column != condition]
    typed = [column for column in _columns_of_images(features) if column != condition]
    image = asked.image or _first_match(others, IMAGE_COLUMN_NAMES, ("image.",)) or next(iter(typed), None)
    caption = asked.caption or _first_match(others, CAPTION_COLUMN_NAMES, ())
    return Columns(image, condition, caption)


def _columns_of_images(features: dict) -> list[str]:
    return [column for column in features if _type_name(features[column]) == "Image"]


def _first_match(columns: Iterable[str], names: tuple[str, ...], prefixes: tuple[str, ...]) -> Optional[str]:
    """The first of `names` among the columns, or else the first column that starts with one of `prefixes`."""
    exact = [name for name in names if name in columns]
    prefixed = [column for prefix in prefixes for column in columns if column.startswith(prefix)]
    return next(iter(exact + prefixed), None)


def _type_name(feature: Any) -> Optional[str]:
    """The name of a feature type in messages. A struct with bytes is an image without the library's metadata."""
    if feature is None:
        return None
    if isinstance(feature, dict):
        return "Image" if "bytes" in feature else "a struct"
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__
