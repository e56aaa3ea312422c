"""Does a picture show what its caption says? Colours by distance, the shape by comparing masks.

    python examples/tiny/evaluate_shapes.py FOLDER        (a folder that shapes.py wrote: checks the evaluator itself)

Three verdicts a picture: background right, colour right, shape right. It knows nothing of how the picture was made: the background is
the most frequent palette colour along the border, the shape is what is not background, its colour the most frequent palette colour
there, and its kind the one whose drawing, at that place and size, overlaps it best (intersection over union).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shapes import COLOURS, SHAPES, Scene, mask

PALETTE = np.array(list(COLOURS.values()), np.float32)
NAMES = list(COLOURS)
MINIMUM_IOU = 0.6  # a blob that overlaps its best shape less is none


class Seen(NamedTuple):
    """What the evaluator sees; `shape` is None for a blob. `cover` is the boolean mask [size, size] of the shape."""

    shape: Optional[str]
    colour: Optional[str]
    background: str
    iou: float
    cover: np.ndarray


def look(image: Image.Image) -> Seen:
    """Reads one square RGB picture."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    nearest = np.square(pixels[:, :, None, :] - PALETTE).sum(-1).argmin(-1)
    border = np.concatenate([nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel(), nearest[:, -2:].ravel()])
    background = int(np.bincount(border, minlength=len(NAMES)).argmax())
    inside = nearest[nearest != background]
    if inside.size < 0.01 * nearest.size:
        return Seen(None, None, NAMES[background], 0.0, nearest != background)
    colour = int(np.bincount(inside, minlength=len(NAMES)).argmax())
    # An edge pixel mixes both colours and may be nearest to a third: decide between the two alone.
    to_colour, to_background = (np.square(pixels - PALETTE[k]).sum(-1) for k in (colour, background))
    cover = to_colour < to_background
    shape, iou = best_shape(cover)
    return Seen(shape if iou >= MINIMUM_IOU else None, NAMES[colour], NAMES[background], iou, cover)


def best_shape(cover: np.ndarray) -> tuple[str, float]:
    """The kind whose filled drawing overlaps a mask best, tried at the mask's bounding box and slightly around, and that overlap."""
    size = cover.shape[0]
    ys, xs = np.nonzero(cover)
    best = ("", 0.0)
    for kind in SHAPES:
        reference = np.nonzero(mask(Scene(kind, "red", "blue"), 256) > 0.5)
        spans = [(axis.max() - axis.min() + 1) / 256 / 0.32 for axis in reference]  # a radius of 1 in heights and widths
        offsets = [((axis.max() + axis.min() + 1) / 512 - 0.5) / 0.32 for axis in reference]
        lows, highs = (np.quantile(ys, 0.01), np.quantile(xs, 0.01)), (np.quantile(ys, 0.99), np.quantile(xs, 0.99))
        radius = np.mean([(high - low + 1) / size / span for low, high, span in zip(lows, highs, spans)])
        middle = [(high + low + 1) / 2 / size - offset * radius for low, high, offset in zip(lows, highs, offsets)]
        for factor in (0.94, 1.0, 1.06):
            drawn = mask(Scene(kind, "red", "blue", (middle[1], middle[0]), radius * factor), size) > 0.5
            overlap = np.logical_and(drawn, cover).sum() / max(1, np.logical_or(drawn, cover).sum())
            best = max(best, (kind, float(overlap)), key=lambda pair: pair[1])
    return best


def parse_caption(caption: str) -> tuple[str, str, str]:
    """(shape, colour, background) of "a red circle on a blue background"."""
    words = caption.split()
    return words[2], words[1], words[5]


def score(images, captions) -> dict[str, float]:
    """Shares of pictures with the right background, colour, both colours, and shape."""
    rows = []
    for image, caption in zip(images, captions):
        seen, (shape, colour, background) = look(image), parse_caption(caption)
        rows.append((seen.background == background, seen.colour == colour, seen.shape == shape))
    right = np.array(rows)
    both = right[:, 0] & right[:, 1]
    return {
        "background": float(right[:, 0].mean()),
        "colour": float(right[:, 1].mean()),
        "both_colours": float(both.mean()),
        "shape": float(right[:, 2].mean()),
        "all": float((both & right[:, 2]).mean()),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="A folder that shapes.py wrote.")
    folder = parser.parse_args(argv).folder
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(folder / row["image_file_name"]) for row in rows]
    for name, value in score(images, [row["text"] for row in rows]).items():
        print(f"{name:13s} {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
