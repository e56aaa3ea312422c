"""Grids of images with labels, and PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from PIL import Image, ImageDraw

from mindtune.cli import UserError
from mindtune.data.labels import LINE, draw, wrap
from mindtune.files import require_writable


def image_grid(rows: Sequence[Sequence[Image.Image]], labels: Optional[Sequence[str]] = None) -> Image.Image:
    """Rows of images, each row under its label (wrapped, in any script).

    Cells are as large as the largest image; small images are enlarged.
    """
    width, height = (max(getattr(image, side) for row in rows for image in row) for side in ("width", "height"))
    scale = max(1, -(-192 // width))
    total = width * scale * max(len(row) for row in rows)
    texts = [wrap(label, total - 6) for label in labels] if labels else [[] for _ in rows]
    band = LINE * max(len(lines) for lines in texts)
    sheet = Image.new("RGB", (total, (height * scale + band) * len(rows)), "white")
    for y, lines in enumerate(texts):  # before any image: a tall letter may reach above its line
        draw(ImageDraw.Draw(sheet), (3, y * (height * scale + band)), lines)
    for y, row in enumerate(rows):
        top = y * (height * scale + band)
        for x, image in enumerate(row):
            enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x * width * scale, top + band))
    return sheet


def save_image(image: Image.Image, path: Path) -> Path:
    """PNG, whatever the folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path


def output_files(name: str, count: int, overwrite: bool) -> tuple[Path, list[Path]]:
    """What --output names, and beside it <name>-1.png ... for the single pictures if there are several.

    Raises UserError for another format than PNG, for files that are there if `overwrite` is false, and where none can be written.
    """
    output = Path(name)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: pictures are written as PNG; give a name that ends in .png.")
    singles = [output.with_name(f"{output.stem}-{n + 1}.png") for n in range(count)] if count > 1 else []
    for path in (output, *singles):
        if path.exists() and not overwrite:
            raise UserError(f"--output {path}: is already there. Name another file or add --overwrite.")
    require_writable("--output", output.parent)
    return output, singles
