"""The images of a validation: those of the prompts in the flags, and one for each line of --validation_file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from PIL import Image

from mindtune.cli import UserError, indented_list, matched, printable
from mindtune.data.conditions import condition_image, mask_image, require_condition
from mindtune.data.file_names import FileNames
from mindtune.data.image_problems import open_image
from mindtune.data.metadata import read_rows
from mindtune.data.text_files import SAVE_AS_UTF8, is_text_file, is_valid_text

EXAMPLE = 'Write one object per line, such as {"prompt": "a cat", "seed": 1}.'
WHOLE = ("seed", "steps", "width", "height", "size")  # keys of whole numbers


class Settings(NamedTuple):
    """What the flags say about validation images. The fields that are flags have the flag's name and meaning."""

    system: str  # as in memory.Settings
    seed: int  # of the run
    validation_prompt: Sequence[str] = ()
    validation_image: Sequence[str] = ()
    validation_mask: Sequence[str] = ()
    fill: bool = False
    validation_file: Optional[str] = None
    num_validation_images: int = 4
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    controlnet_conditioning_scale: float = 1.0

    @property
    def multiple(self) -> int:
        """The sides of an image are divisible by it."""
        return 16 if self.system.startswith("flux") else 8

    @property
    def keys(self) -> list[str]:
        """The keys that a line of --validation_file may have."""
        keys = ["prompt", "seed", "width", "height", "size", "steps", "guidance"]
        if self.system != "flux_lora":
            keys.append("image")
        if "controlnet" in self.system:
            keys.append("scale")
        if self.fill:
            keys.append("mask")
        return keys if self.system.startswith("flux") else [*keys, "negative_prompt"]


class Row(NamedTuple):
    """One validation image and how it is sampled.

    Its noise has the key (`seed`, "validation", `number`). `size` is (height, width) in pixels; a row without one gets
    it from `load_conditions` or `with_size`. `image` is the path of the condition image, which `load_conditions` reads
    into `condition`, and `scale` the conditioning scale. `mask` is the path of the mask of a fill model, which is read
    into `mask_image`, in gray. `place` is the number of the row in --validation_file, from 1;
    0 for an image of the flags.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    size: Optional[tuple[int, int]] = None
    number: int = 0
    negative_prompt: Optional[str] = None
    image: Optional[str] = None
    scale: Optional[float] = None
    condition: Optional[Image.Image] = None
    mask: Optional[str] = None
    mask_image: Optional[Image.Image] = None
    place: int = 0

    def sampling(self) -> dict[str, Any]:
        """What `sampling.flux_image` takes of the row."""
        names = ("size", "seed", "number", "steps", "guidance")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> dict[str, Any]:
        """The row with the keys of --validation_file: all that it depends on, except the contents of `image`."""
        height, width = self.size
        row = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed}
        row.update(width=width, height=height, steps=self.steps, guidance=self.guidance)
        if self.image:
            row.update(image=self.image, mask=self.mask, scale=self.scale)
        return {key: value for key, value in row.items() if value is not None}


def read(settings: Settings) -> list[Row]:
    """The images of the prompts in the flags, and then those of --validation_file.

    A line without `image` has that of --validation_image, if it is one and has no prompt of its own, and a line without
    `mask` that of --validation_mask. Images to edit (flux_kontext) may be left out. Raises UserError that lists all
    lines that cannot be used, or if prompts and condition images do not match or cannot be read.
    """
    prompts, images = settings.validation_prompt, settings.validation_image
    default = Row(
        prompt="",
        seed=settings.seed,
        steps=settings.num_inference_steps,
        guidance=settings.guidance_scale,
        scale=settings.controlnet_conditioning_scale if "scale" in settings.keys else None,
    )
    pairs = [(prompt, (None, None)) for prompt in prompts]
    if settings.validation_file is not None and not prompts and len(images) == 1:
        default = default._replace(image=images[0])
    elif settings.system != "flux_lora" and (images or settings.system != "flux_kontext"):
        pairs = matched(prompts, _with_masks(settings), "--validation_prompt", "--validation_image")
    for flag, paths in (("--validation_image", images), ("--validation_mask", settings.validation_mask)):
        for path in paths:
            require_condition(path, flag)
    numbers = range(settings.num_validation_images)
    rows = [
        default._replace(prompt=prompt, image=path, mask=mask, number=n)
        for prompt, (path, mask) in pairs
        for n in numbers
    ]
    if len(settings.validation_mask) == 1:
        default = default._replace(mask=settings.validation_mask[0])
    return rows if settings.validation_file is None else rows + _read_file(settings, default)


def _with_masks(settings: Settings) -> list[tuple[str, Optional[str]]]:
    """(image, mask) of each --validation_image; the mask is None unless a fill model is trained."""
    images, masks = settings.validation_image, settings.validation_mask
    if not settings.fill:
        return [(image, None) for image in images]
    if len(masks) not in (1, len(images)):
        raise UserError(
            f"--validation_mask: {len(masks)} for {len(images)} of --validation_image. Give one each, or one for all."
        )
    return list(zip(images, list(masks) * len(images)))


def with_size(rows: list[Row], size: tuple[int, int]) -> list[Row]:
    """The rows; those without a size get `size`, (height, width) in pixels."""
    return [row._replace(size=row.size or size) for row in rows]


def load_conditions(rows: list[Row], resolution: Union[int, list[int]], multiple: int, background: str) -> list[Row]:
    """The rows with their condition images, resized by `condition_image`, on the background of the training data.

    Rows without a size get that of their condition; rows without a condition stay as they are. Of several resolutions
    the largest counts. Raises UserError if an image cannot be read.
    """
    resolution = max(resolution) if isinstance(resolution, list) else resolution
    loaded: dict[tuple, Image.Image] = {}
    for row in rows:
        if row.image and (row.image, row.size) not in loaded:
            flag = _source_of(row, "--validation_image")
            image = condition_image(row.image, flag, resolution, multiple, background, row.size)
            loaded[row.image, row.size] = image
    return [_with_condition(row, loaded[row.image, row.size]) if row.image else row for row in rows]


def _with_condition(row: Row, image: Image.Image) -> Row:
    """The row with its loaded condition image, and with its mask in the same size."""
    size = (image.height, image.width)
    row = row._replace(condition=image, size=size)
    if row.mask is None:
        return row
    return row._replace(mask_image=mask_image(row.mask, _source_of(row, "--validation_mask"), size))


def _source_of(row: Row, flag: str) -> str:
    """What named an image of the row, in messages: its line in --validation_file, or the flag."""
    return f"--validation_file, row {row.place}:" if row.place else flag


def captions(rows: list[Row]) -> list[str]:
    """The texts that are encoded for the rows."""
    return [text for row in rows for text in (row.prompt, row.negative_prompt) if text is not None]


# ---- the file ------------------------------------------------------------------------------------


def _read_file(settings: Settings, default: Row) -> list[Row]:
    """The rows of --validation_file. A key that is left out, or null, has its value in `default`."""
    path = Path(settings.validation_file).expanduser()
    flag = f"--validation_file {printable(settings.validation_file)}"
    if not path.is_file():
        raise UserError(f"{flag}: no such file. {EXAMPLE}")
    if path.suffix.lower() in (".csv", ".tsv") or not is_text_file(path):
        raise UserError(f"{flag}: is no file of JSON lines. {EXAMPLE}")
    names = FileNames(path.parent)
    rows, problems = [], []
    try:
        for line, content in read_rows(path):
            try:
                rows.append(_make_row(content, settings, default, names)._replace(place=len(rows) + 1))
            except ValueError as error:
                problems.append(f"line {line}: {error}")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: is not {error.encoding.upper()} text. Save it as UTF-8: {SAVE_AS_UTF8}.") from None
    if problems:
        raise UserError(f"{flag}: {len(problems)} of its lines cannot be used:\n{indented_list(problems)}")
    if not rows:
        raise UserError(f"{flag}: has no rows. {EXAMPLE}")
    if default.image and all(row.image is not default.image for row in rows):
        raise UserError(
            f"--validation_image {printable(default.image)}: every line of {flag} names its own image. Leave the flag "
            "out, or give --validation_prompt."
        )
    return rows


def _make_row(content: Any, settings: Settings, default: Row, names: FileNames) -> Row:
    """The row of one line. Raises ValueError that lists what is wrong with it."""
    if isinstance(content, ValueError):
        raise ValueError(f"{content}. {EXAMPLE}")
    # Tables that are saved as JSON lines have null in empty cells, and 28.0 for 28 in columns with such cells.
    values = {key: value for key, value in content.items() if value is not None}
    whole = {key: int(values[key]) for key in WHOLE if isinstance(values.get(key), float) and values[key].is_integer()}
    values.update(whole)
    problems = [problem for key, value in values.items() if (problem := _problem(key, value, settings))]
    if "prompt" not in values:
        problems.append("prompt is missing")
    if "size" in values and ("width" in values or "height" in values):
        problems.append("size is for squares: give it, or width and height")
    elif ("width" in values) != ("height" in values):
        problems.append("width and height belong together: give both, or size for a square")
    if problems:
        raise ValueError("; ".join(problems))
    side = values.pop("size", None)
    size = (side, side) if side else None
    if "width" in values:
        size = (values.pop("height"), values.pop("width"))
    for key in ("image", "mask"):
        if key in values:
            values[key] = _find_image(key, values[key], names)
    row = default._replace(size=size, **values)
    if settings.fill and row.mask is None:
        raise ValueError("mask is missing: name the mask of the image, or one for all lines by --validation_mask")
    if row.image is None and "image" in settings.keys and settings.system != "flux_kontext":
        raise ValueError("image is missing: name a condition image, or one for all lines by --validation_image")
    if row.negative_prompt is not None and row.guidance == 1:
        raise ValueError("negative_prompt has no effect with a guidance of 1: give a higher one, or leave it out")
    return row


def _problem(key: str, value: Any, settings: Settings) -> Optional[str]:
    """What is wrong with a key or its value, and what it must be; None if it is right."""
    if key not in settings.keys:
        near = difflib.get_close_matches(key.lower(), settings.keys, 1)
        return f"{printable(key, 60)} is no key. " + (
            f"Did you mean {near[0]}?" if near else f"There are {', '.join(settings.keys)}"
        )
    multiple, least = settings.multiple, 16 if settings.multiple == 16 else 64
    text = isinstance(value, str) and is_valid_text(value)
    whole = type(value) is int
    number = type(value) in (int, float) and abs(value) < 1e9
    side = (
        whole and value % multiple == 0 and value >= least,
        f"a multiple of {multiple} and at least {least}, in pixels",
    )
    is_right, kind = {
        "seed": (whole, "a whole number"),
        "width": side,
        "height": side,
        "size": side,
        "steps": (whole and value >= 1, "a whole number of 1 or more"),
        "guidance": (number and value >= 0, "a number of 0 or more"),
        "scale": (number, "a number"),
        "image": (text and value != "", "the path of an image, relative to this file"),
        "mask": (text and value != "", "the path of an image, relative to this file"),
    }.get(key, (text, "text"))
    return None if is_right else f"{key} is {printable(repr(value), 120)}, must be {kind}"


def _find_image(key: str, name: str, names: FileNames) -> str:
    """The path of a condition image or mask that can be read. Raises ValueError."""
    path = names.root / (names.find(name) or Path(name).expanduser())
    try:
        open_image(path)
    except ValueError as error:
        raise ValueError(f"{key} {printable(name)} cannot be read ({error})") from None
    return str(path)
