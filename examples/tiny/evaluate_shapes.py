"""Checks whether images show what their captions say: colours by distance, the shape by comparing masks.

    python examples/tiny/evaluate_shapes.py --folder FOLDER     # checks the evaluator on a folder that shapes.py wrote
    python examples/tiny/evaluate_shapes.py --pipeline DIR      # generates images of held-out captions with a pipeline

Three verdicts per image: background, colour and shape. They use the pixels only: the background is the most frequent
palette colour along the border, the shape is everything else, its colour the most frequent palette colour in it, and
its kind the one whose mask, at the same position and size, has the largest intersection over union with it.
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
from shapes import COLOURS, RADII, SHAPES, Scene, checkers, mask, sample_scene

PALETTE = np.array(list(COLOURS.values()), np.float32)
NAMES = list(COLOURS)
MINIMUM_IOU = 0.6  # below this overlap with the best kind, a blob counts as no shape


class Recognized(NamedTuple):
    """The content of an image; `shape` is None for a blob. `cover` is the boolean mask [size, size] of the shape."""

    shape: Optional[str]
    colour: Optional[str]
    background: str
    iou: float
    cover: np.ndarray


def recognize(image: Image.Image) -> Recognized:
    """The content of a square RGB image."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    nearest = np.square(pixels[:, :, None, :] - PALETTE).sum(-1).argmin(-1)
    border = np.concatenate(
        [nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel(), nearest[:, -2:].ravel()]
    )
    background = int(np.bincount(border, minlength=len(NAMES)).argmax())
    inside = nearest[nearest != background]
    if inside.size < 0.01 * nearest.size:
        return Recognized(None, None, NAMES[background], 0.0, nearest != background)
    colour = int(np.bincount(inside, minlength=len(NAMES)).argmax())
    # An edge pixel mixes both colours and may be nearest to a third one, so only these two are compared.
    to_colour, to_background = (np.square(pixels - PALETTE[k]).sum(-1) for k in (colour, background))
    cover = to_colour < to_background
    shape, iou = best_shape(cover)
    return Recognized(shape if iou >= MINIMUM_IOU else None, NAMES[colour], NAMES[background], iou, cover)


def best_shape(cover: np.ndarray) -> tuple[str, float]:
    """(kind, intersection over union) of the kind that overlaps a mask best at about its size."""
    size = cover.shape[0]
    ys, xs = np.nonzero(cover)
    best = ("", 0.0)
    for kind in SHAPES:
        reference = np.nonzero(mask(Scene(kind, "red", "blue"), 256) > 0.5)
        # Height and width of the kind, and the offset of its bounding box from its centre, in radii.
        spans = [(axis.max() - axis.min() + 1) / 256 / 0.32 for axis in reference]
        offsets = [((axis.max() + axis.min() + 1) / 512 - 0.5) / 0.32 for axis in reference]
        lows = (np.quantile(ys, 0.01), np.quantile(xs, 0.01))
        highs = (np.quantile(ys, 0.99), np.quantile(xs, 0.99))
        radius = np.mean([(high - low + 1) / size / span for low, high, span in zip(lows, highs, spans)])
        middle = [(high + low + 1) / 2 / size - offset * radius for low, high, offset in zip(lows, highs, offsets)]
        for factor in (0.94, 1.0, 1.06):
            candidate = mask(Scene(kind, "red", "blue", (middle[1], middle[0]), radius * factor), size) > 0.5
            best = max(best, (kind, iou_of(candidate, cover)), key=lambda pair: pair[1])
    return best


def overlap(image: Image.Image, target: Image.Image) -> float:
    """Intersection over union of the shapes in two images of the same size; 0 if one has none."""
    return iou_of(recognize(image).cover, recognize(target).cover)


def iou_of(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two boolean masks."""
    return float(np.logical_and(first, second).sum() / max(1, np.logical_or(first, second).sum()))


def is_edit(image: Image.Image, target: Image.Image) -> bool:
    """Whether an image has both colours of another one, and its shape overlaps with that of the other by 0.8."""
    found, wanted = recognize(image), recognize(target)
    colours = (found.colour, found.background) == (wanted.colour, wanted.background)
    return colours and iou_of(found.cover, wanted.cover) >= 0.8


def is_subject(image: Image.Image, colours: tuple[str, str]) -> bool:
    """Whether the image shows a shape checkered in these two colours.

    Each colour covers at least a quarter of the shape, and checkers of the right width, at the best position, agree
    with four fifths of its pixels (chance is one half).
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    size = len(pixels)
    first, second = (np.square(pixels - COLOURS[name]).sum(-1) for name in colours)
    other_colours = [value for name, value in COLOURS.items() if name not in colours]
    others = np.square(pixels[:, :, None, :] - other_colours).sum(-1).min(-1)
    inside = np.minimum(first, second) < others
    share = np.mean((second < first)[inside]) if inside.sum() > 0.05 * size * size else 0.0
    if not 0.25 <= share <= 0.75:
        return False
    pattern = np.where(second < first, 1.0, -1.0) * inside
    positions = [0.5 + step / 64 for step in range(-12, 13)]
    scenes = [
        Scene("circle", *colours, (x, y), radius) for radius in (*RADII, 0.3) for x in positions for y in positions
    ]
    agreements = [abs((np.where(checkers(scene, size), 1.0, -1.0) * pattern).sum()) for scene in scenes]
    return bool(max(agreements) / inside.sum() >= 0.6)  # agreeing minus disagreeing pixels: 0.8 - 0.2


def parse_caption(caption: str) -> tuple[str, str, str]:
    """(shape, colour, background) of "a red circle on a blue background"."""
    words = caption.split()
    return words[2], words[1], words[5]


def score(images: list[Image.Image], captions: list[str]) -> dict[str, float]:
    """The fraction of images with the right background, colour, both colours, shape, and all of them."""
    rows = []
    for image, caption in zip(images, captions):
        found = recognize(image)
        shape, colour, background = parse_caption(caption)
        rows.append((found.background == background, found.colour == colour, found.shape == shape))
    right = np.array(rows)
    both = right[:, 0] & right[:, 1]
    return {
        "background": float(right[:, 0].mean()),
        "colour": float(right[:, 1].mean()),
        "both_colours": float(both.mean()),
        "shape": float(right[:, 2].mean()),
        "all": float((both & right[:, 2]).mean()),
    }


def generate(
    root: Path,
    captions: list[str],
    steps: int = 12,
    seed: int = 0,
    size: int = 64,
    tokens: int = 12,
    adapter: Optional[Path] = None,
) -> list[Image.Image]:
    """One image per caption by the pipeline in `root`, with a LoRA of its transformer if `adapter` names a file.

    Every image has its own noise. `tokens` is the length of T5's input.
    """
    import mindspore as ms

    from mindtune import rng
    from mindtune.encode.text_encoders import token_ids
    from mindtune.models import configs, execution, loading, lora, precision, sampling, tokenization

    execution.set_up_device(graph_mode=False)
    full = precision.resolve_precision("no")
    cells = [loading.load_model(root, part, full) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")]
    tokenizers = tokenization.load_tokenizer(root / "tokenizer"), tokenization.load_tokenizer(root / "tokenizer_2")
    scheduler = configs.read_config(root, "scheduler")
    images = []
    transformer, clip, t5, vae = cells
    if adapter:
        lora.load_lora(adapter, {"transformer": transformer}, ms.float32)
    with execution.pynative():
        for start in range(0, len(captions), 50):
            batch = captions[start : start + 50]
            ids = [np.stack([token_ids(t, c, n) for c in batch]) for t, n in zip(tokenizers, (77, tokens))]
            pooled = clip(ms.Tensor(ids[0], ms.int32))[1].asnumpy()
            text = t5(ms.Tensor(ids[1]))[0].asnumpy()
            shape = (vae.config["latent_channels"], size // 8, size // 8)
            noise = np.stack([rng.normal(seed, "evaluation", start + k, shape=shape) for k in range(len(batch))])
            latents = sampling.sample_latents(
                transformer,
                scheduler,
                prompt_embeds=text,
                pooled_prompt_embeds=pooled,
                noise=noise,
                steps=steps,
                guidance_scale=3.5,
                compute=ms.float32,
            )
            images += sampling.decode_latents(vae, latents, ms.float32)
    return images


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path, help="Directory that shapes.py wrote.")
    source.add_argument("--pipeline", type=Path, help="Directory of a pipeline that pretrain_tiny_flux.py wrote.")
    parser.add_argument("--count", type=int, default=200, help="Images to generate with --pipeline. Default: 200.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of captions and noise with --pipeline. Default: 0.")
    parser.add_argument("--grid", type=Path, help="PNG file for the first 48 images. Default: none.")
    args = parser.parse_args(argv)
    if args.folder:
        rows = [json.loads(line) for line in (args.folder / "metadata.jsonl").read_text().splitlines()]
        images = [Image.open(args.folder / row["image_file_name"]) for row in rows]
        captions = [row["text"] for row in rows]
    else:
        rng = np.random.default_rng(args.seed)
        captions = [sample_scene(rng, "held_out").caption for _ in range(args.count)]
        images = generate(args.pipeline, captions, seed=args.seed)
    for name, value in score(images, captions).items():
        print(f"{name:13s} {value:.3f}")
    if args.grid:
        from mindtune.data.grids import image_grid, save_image

        names = [caption.replace("a ", "").replace(" background", "") for caption in captions]
        starts = range(0, min(48, len(images)), 8)
        labels = [" | ".join(names[start : start + 8]) for start in starts]
        save_image(image_grid([images[start : start + 8] for start in starts], labels), args.grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
