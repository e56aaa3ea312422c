"""Does a picture show what its caption says? Colours by distance, the shape by comparing masks.

    python examples/tiny/evaluate_shapes.py --folder FOLDER       (a folder that shapes.py wrote: checks the evaluator itself)
    python examples/tiny/evaluate_shapes.py --pipeline DIR        (a trained pipeline: draws captions of pairs it never saw)

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
from shapes import COLOURS, RADII, SHAPES, Scene, checkers, draw_scene, mask

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
    border = np.concatenate(
        [nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel(), nearest[:, -2:].ravel()]
    )
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
        spans = [
            (axis.max() - axis.min() + 1) / 256 / 0.32 for axis in reference
        ]  # a radius of 1 in heights and widths
        offsets = [((axis.max() + axis.min() + 1) / 512 - 0.5) / 0.32 for axis in reference]
        lows, highs = (np.quantile(ys, 0.01), np.quantile(xs, 0.01)), (np.quantile(ys, 0.99), np.quantile(xs, 0.99))
        radius = np.mean([(high - low + 1) / size / span for low, high, span in zip(lows, highs, spans)])
        middle = [(high + low + 1) / 2 / size - offset * radius for low, high, offset in zip(lows, highs, offsets)]
        for factor in (0.94, 1.0, 1.06):
            drawn = mask(Scene(kind, "red", "blue", (middle[1], middle[0]), radius * factor), size) > 0.5
            overlap = np.logical_and(drawn, cover).sum() / max(1, np.logical_or(drawn, cover).sum())
            best = max(best, (kind, float(overlap)), key=lambda pair: pair[1])
    return best


def overlap(image: Image.Image, target: Image.Image) -> float:
    """Intersection over union of the shapes that two pictures of one size show; 0 if one shows none."""
    drawn, wanted = look(image).cover, look(target).cover
    return float(np.logical_and(drawn, wanted).sum() / max(1, np.logical_or(drawn, wanted).sum()))


def is_subject(image: Image.Image, colours: tuple[str, str]) -> bool:
    """Does the picture show a shape checkered in these two colours? Each covers a quarter of it at least, and squares of the right
    width, laid over it where they fit best, agree with four fifths of its pixels (half would be chance)."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    size = len(pixels)
    first, second = (np.square(pixels - COLOURS[name]).sum(-1) for name in colours)
    others = (
        np.square(pixels[:, :, None, :] - [value for name, value in COLOURS.items() if name not in colours])
        .sum(-1)
        .min(-1)
    )
    inside = np.minimum(first, second) < others
    share = np.mean((second < first)[inside]) if inside.sum() > 0.05 * size * size else 0.0
    if not 0.25 <= share <= 0.75:
        return False
    pattern = np.where(second < first, 1.0, -1.0) * inside
    places = [0.5 + step / 64 for step in range(-12, 13)]
    scenes = [Scene("circle", *colours, (x, y), radius) for radius in (*RADII, 0.3) for x in places for y in places]
    agreement = (
        max(abs((np.where(checkers(scene, size), 1.0, -1.0) * pattern).sum()) for scene in scenes) / inside.sum()
    )
    return bool(agreement >= 0.6)  # agreeing minus disagreeing shares: 0.8 - 0.2


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


def draw(
    root: Path, captions: list[str], steps: int = 12, seed: int = 0, size: int = 64, tokens: int = 12
) -> list[Image.Image]:
    """A picture of every caption by the pipeline in `root`, each from its own seeded noise."""
    import mindspore as ms

    from mindtune import rng
    from mindtune.encode.text_encoders import token_ids
    from mindtune.models import configs, execution, loading, precision, sampling, tokenization

    execution.set_up_device(graph_mode=False)
    full = precision.resolve_precision("no")
    cells = [loading.load_model(root, part, full) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")]
    tokenizers = tokenization.load_tokenizer(root / "tokenizer"), tokenization.load_tokenizer(root / "tokenizer_2")
    scheduler, images = configs.read_config(root, "scheduler"), []
    transformer, clip, t5, vae = cells
    with execution.pynative():
        for start in range(0, len(captions), 50):
            batch = captions[start : start + 50]
            ids = [np.stack([token_ids(t, c, n) for c in batch]) for t, n in zip(tokenizers, (77, tokens))]
            pooled, text = clip(ms.Tensor(ids[0], ms.int32))[1].asnumpy(), t5(ms.Tensor(ids[1]))[0].asnumpy()
            shape = (vae.config["latent_channels"], size // 8, size // 8)
            noise = np.stack([rng.normal(seed, "evaluation", start + k, shape=shape) for k in range(len(batch))])
            latents = sampling.sample_latents(transformer, scheduler, text, pooled, noise, steps, 3.5, ms.float32)
            images += sampling.decode_latents(vae, latents, ms.float32)
    return images


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--folder", type=Path, help="A folder that shapes.py wrote.")
    what.add_argument("--pipeline", type=Path, help="A pipeline that pretrain_tiny_flux.py wrote.")
    parser.add_argument("--count", type=int, default=200, help="Pictures to draw with --pipeline.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of captions and noise with --pipeline.")
    parser.add_argument("--grid", type=Path, help="PNG file for the first 48 of them.")
    args = parser.parse_args(argv)
    if args.folder:
        rows = [json.loads(line) for line in (args.folder / "metadata.jsonl").read_text().splitlines()]
        images, captions = (
            [Image.open(args.folder / row["image_file_name"]) for row in rows],
            [row["text"] for row in rows],
        )
    else:
        rng = np.random.default_rng(args.seed)
        captions = [draw_scene(rng, "held_out").caption for _ in range(args.count)]
        images = draw(args.pipeline, captions, seed=args.seed)
    for name, value in score(images, captions).items():
        print(f"{name:13s} {value:.3f}")
    if args.grid:
        from mindtune.data.grids import image_grid, save_image

        names = [caption.replace("a ", "").replace(" background", "") for caption in captions]
        rows = [range(start, min(start + 8, len(images))) for start in range(0, min(48, len(images)), 8)]
        save_image(
            image_grid([[images[k] for k in row] for row in rows], [" | ".join(names[k] for k in row) for row in rows]),
            args.grid,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
