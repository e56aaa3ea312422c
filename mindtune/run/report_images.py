"""The images of a report: the grids of the prompts, and a table of the rows of --validation_file over the updates."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROWS_FILE = "rows.jsonl"  # in a folder of images: what each row of --validation_file was, as `Row.describe` has it
GRID_SIZE = (1280, 16000)  # in pixels at most; WebP has at most 16383
# They bound a report to some megabytes.
THUMBNAIL_SIZE = (256, 512)
MAX_ROWS = 100
MAX_COLUMNS = 12
MAX_THUMBNAILS = 400


def picture_name(place: int, kind: str = "") -> str:
    """The file of an image of row `place`: row-03.png of the trained model, row-03-base.png, row-03-condition.png."""
    return f"row-{place:02d}{'-' if kind else ''}{kind}.png"


def validation_images(output_dir: Path) -> list[tuple[Path, str]]:
    """(PNG file, when it was sampled) of the grid of every validation, in their order."""
    paths = sorted((output_dir / "samples").glob("step-*.png"))
    final = output_dir / "samples" / "final.png"
    return [(path, _when(path.stem)) for path in [*paths, *([final] if final.is_file() else [])]]


def grids(output_dir: Path) -> str:
    """The grids with a slider that selects one; without JavaScript the last one is shown. Empty if there are none."""
    found = validation_images(output_dir)
    if not found:
        return ""
    last = len(found) - 1
    images = "".join(
        f'<img alt="{name}" src="{_data(path, GRID_SIZE)}"{"" if number == last else " hidden"}>'
        for number, (path, name) in enumerate(found)
    )
    slider = f'<input type="range" id="step" min="0" max="{last}" value="{last}" aria-label="Validation">'
    caption = f'<span id="caption">{found[-1][1]}</span>'
    return f'<p>{slider} {caption}</p><div id="images">{images}</div>'


def newest_rows(output_dir: Path) -> list[tuple[Path, str]]:
    """(PNG file, its prompt) of each row of --validation_file in the last validation."""
    samples = output_dir / "samples"
    folders = [*sorted(samples.glob(f"step-*/{ROWS_FILE}")), *samples.glob(f"final/{ROWS_FILE}")]
    if not folders:
        return []
    prompts = [json.loads(text)["prompt"] for text, _ in _keys(folders[-1].parent)]
    return [(folders[-1].with_name(picture_name(place)), prompt) for place, prompt in enumerate(prompts, 1)]


class _Column(NamedTuple):
    """A column of the table: its title, and the file of each row's image, by the row's key."""

    title: str
    paths: dict[tuple, Path]


def table(output_dir: Path) -> str:
    """A table with a line per row of --validation_file and a column per validation. Empty without such rows.

    Rows are the same if all of their settings are: those of a file that was changed before resuming are apart. A table
    that is too large for a page has a part of the columns, the first and the last always, and the first rows.
    """
    folders = sorted((output_dir / "samples").glob(f"step-*/{ROWS_FILE}"))
    folders = [path.parent for path in (*folders, *(output_dir / "samples").glob(f"final/{ROWS_FILE}"))]
    validations = [(folder, _keys(folder)) for folder in folders]
    all_keys = list(dict.fromkeys(key for _, keys in reversed(validations) for key in keys))
    keys = all_keys[:MAX_ROWS]
    if not keys:
        return ""
    count = min(len(folders), max(2, min(MAX_COLUMNS, MAX_THUMBNAILS // len(keys))))
    chosen = sorted({round(place) for place in np.linspace(len(folders) - 1, 0, count)})
    columns = [_column(title, validations, kind) for title, kind in (("condition", "condition"), ("base", "base"))]
    columns += [_column(_when(validations[n][0].name), [validations[n]]) for n in chosen]
    columns = [column for column in columns if column.paths]
    lines = ["".join(f"<th>{title}</th>" for title in ("", *(column.title for column in columns)))]
    lines += [_label(key) + "".join(_cell(column, key) for column in columns) for key in keys]
    notes = ["Images in full size are in samples/."]
    if len(chosen) < len(folders):
        notes.append(f"{len(chosen)} of {len(folders)} validations are shown.")
    if len(keys) < len(all_keys):
        notes.append(f"{len(keys)} of {len(all_keys)} rows are shown.")
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<p>{" ".join(notes)}</p><div class="table rows"><table>{rows}</table></div>'


def _keys(folder: Path) -> dict[tuple, int]:
    """The key of each row of a folder: its settings as text, and how many rows before it have the same; its place."""
    texts = (folder / ROWS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    return {(text, texts[:index].count(text)): index + 1 for index, text in enumerate(texts)}


def _column(title: str, validations: list[tuple[Path, dict]], kind: str = "") -> _Column:
    """The column of the images of a kind, each from the last validation that has it."""
    paths = {}
    for folder, keys in validations:
        for key, place in keys.items():
            path = folder / picture_name(place, kind)
            if path.is_file():
                paths[key] = path
    return _Column(title, paths)


def _label(key: tuple) -> str:
    row = json.loads(key[0])
    prompt = html.escape(row.pop("prompt"))
    width, height = row.pop("width"), row.pop("height")
    if "image" in row:
        row["image"] = Path(row["image"]).name
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.items())
    return f"<th>{prompt}<br><small>{width} x {height}, {html.escape(settings)}</small></th>"


def _cell(column: _Column, key: tuple) -> str:
    if key not in column.paths:
        return "<td></td>"
    return f'<td><img alt="{column.title}" src="{_data(column.paths[key], THUMBNAIL_SIZE)}"></td>'


def _when(name: str) -> str:
    """When the images in step-000100 or final were sampled, in words."""
    return "at the end" if name == "final" else f"after {int(name[5:]):,} updates"


def _data(path: Path, size: tuple[int, int]) -> str:
    """An image file as a data URL, reduced if it is larger than `size`, (width, height) in pixels."""
    image = Image.open(path).convert("RGB")
    image.thumbnail(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
