"""Grids of labelled images, and PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from PIL import Image, ImageDraw

from mindtune.cli import UserError
from mindtune.data.labels import LINE_HEIGHT, draw_lines, wrap
from mindtune.files import require_writable, write_atomically

MIN_CELL_WIDTH = 192  # smaller images are enlarged by a whole number, to leave room for their labels
LABEL_MARGIN = 3


def image_grid(rows: Sequence[Sequence[Image.Image]], labels: Optional[Sequence[str]] = None) -> Image.Image:
    """One image with all of the images in `rows`, each row under its label.

    Labels are wrapped and may be in any script. All cells have the size of the largest image. Images narrower than
    192 pixels are enlarged.
    """
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    scale = max(1, -(-MIN_CELL_WIDTH // width))
    cell_width = width * scale
    cell_height = height * scale
    sheet_width = cell_width * max(len(row) for row in rows)
    if labels:
        label_lines = [wrap(label, sheet_width - 2 * LABEL_MARGIN) for label in labels]
    else:
        label_lines = [[] for _ in rows]
    # Every row takes the height of its own label.
    tops = [0]
    for lines in label_lines:
        tops.append(tops[-1] + LINE_HEIGHT * len(lines) + cell_height)
    sheet = Image.new("RGB", (sheet_width, tops[-1]), "white")
    canvas = ImageDraw.Draw(sheet)
    for top, lines in zip(tops, label_lines):  # before the images: a tall letter may reach above its line
        draw_lines(canvas, (LABEL_MARGIN, top), lines)
    for top, lines, row in zip(tops, label_lines, rows):
        for column, image in enumerate(row):
            enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * cell_width, top + LINE_HEIGHT * len(lines)))
    return sheet


def save_image(image: Image.Image, path: Path) -> Path:
    """Writes a PNG file, creating its directory if needed, and returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda beside: image.save(beside, format="PNG"))
    return path


def output_files(name: str, count: int, overwrite: bool) -> tuple[Path, list[Path]]:
    """The file that --output names, and for several images one file each next to it: <name>-1.png, <name>-2.png ...

    Raises UserError if the name does not end in .png, if a file exists and `overwrite` is false, or if the directory
    is not writable.
    """
    output = Path(name)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: images are written as PNG; give a name that ends in .png.")
    singles = [output.with_name(f"{output.stem}-{n + 1}.png") for n in range(count)] if count > 1 else []
    for path in (output, *singles):
        if path.exists() and not overwrite:
            raise UserError(f"--output {path}: is already there. Name another file or add --overwrite.")
    require_writable("--output", output.parent)
    return output, singles
