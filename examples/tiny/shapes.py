"""A synthetic data set: images of one shape in one colour on a background of another, with captions and outlines.

    python examples/tiny/shapes.py OUT --count 1000 --size 64 --seed 0 [--split train|held_out|all] [--edits]

Writes OUT/images, OUT/conditioning (white outlines on black) and OUT/metadata.jsonl, which the `datasets` library reads
with the columns image, conditioning_image and text ("a red circle on a blue background"), like fill50k. The split
`held_out` has the quarter of the colour and shape pairs that `train` leaves out: a model that draws them has learned
colours and shapes separately.

With --edits it writes OUT/targets, OUT/sources and OUT/metadata.jsonl with the columns target, source and instruction:
"make the shape red" or "make the background blue".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (40, 70, 200),
    "yellow": (245, 215, 50),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = (0.26, 0.34)  # at every position the whole shape lies inside the image
OVERSAMPLING = 4  # shapes are drawn at this scale and averaged down, for smooth edges


class Scene(NamedTuple):
    """What an image shows. `centre` and `radius` are fractions of the side; with `second` the shape is checkered."""

    shape: str
    colour: str
    background: str
    centre: tuple[float, float] = (0.5, 0.5)
    radius: float = 0.32
    second: Optional[str] = None

    @property
    def caption(self) -> str:
        """The caption; a checkered shape has the word sks in place of its colour."""
        return f"a {'sks' if self.second else self.colour} {self.shape} on a {self.background} background"


def held_out(colour: str, shape: str) -> bool:
    """True for two of the eight colours of every shape; the pattern keeps every colour and every shape in `train`."""
    index = 3 * SHAPES.index(shape) + list(COLOURS).index(colour)
    return index % len(COLOURS) in (0, 5)


def pairs(split: str) -> list[tuple[str, str]]:
    """(colour, shape) pairs of a split: train, held_out or all."""
    all_pairs = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    return [pair for pair in all_pairs if split == "all" or held_out(*pair) == (split == "held_out")]


@lru_cache
def scenes(split: str) -> tuple[Scene, ...]:
    """Every scene of a split: each pair on each other colour, at four positions, in two sizes.

    The positions are a quarter of the side apart: at 64 pixels one token of FLUX, which is easier to learn.
    """
    steps = (-1, 1)
    return tuple(
        Scene(shape, colour, background, (0.5 + across / 8, 0.5 + down / 8), radius)
        for colour, shape in pairs(split)
        for background in COLOURS
        if background != colour
        for down in steps
        for across in steps
        for radius in RADII
    )


def sample_scene(rng: np.random.Generator, split: str = "train", anywhere: bool = False) -> Scene:
    """A random scene of `scenes(split)`; with `anywhere` its position and size are any between theirs."""
    choices = scenes(split)
    scene = choices[rng.integers(len(choices))]
    if anywhere:
        centre = tuple((0.5 + rng.uniform(-1, 1, 2) / 8).tolist())
        scene = scene._replace(centre=centre, radius=float(rng.uniform(*RADII)))
    return scene


class Edit(NamedTuple):
    """A scene, an instruction to give one of its two colours another value, and the scene that it asks for."""

    source: Scene
    instruction: str
    target: Scene


def sample_edit(rng: np.random.Generator, split: str = "train") -> Edit:
    """A random edit of a random scene of `scenes(split)`. The new colour is a third one."""
    scene = sample_scene(rng, split)
    others = [name for name in COLOURS if name not in (scene.colour, scene.background)]
    colour = others[rng.integers(len(others))]
    if rng.integers(2):
        return Edit(scene, f"make the shape {colour}", scene._replace(colour=colour))
    return Edit(scene, f"make the background {colour}", scene._replace(background=colour))


# ---- drawing -------------------------------------------------------------------------------------


def outline_points(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit circle, y down; 96 points for circle and ring."""

    def polygon(count, first, radii=(1.0,)):
        angles = [first + 2 * math.pi * i / count for i in range(count)]
        return [
            (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)
        ]

    if shape in ("circle", "ring"):
        return polygon(96, 0.0)
    if shape == "square":
        return polygon(4, math.pi / 4)
    if shape == "triangle":
        return polygon(3, -math.pi / 2)
    if shape == "star":
        return polygon(10, -math.pi / 2, (1.0, 0.45))
    arm = 0.36
    quarter = [(-arm, -0.95), (arm, -0.95), (arm, -arm)]
    return [point for k in range(4) for point in _rotate(quarter, k)]


def _rotate(points, quarters):
    """`points` rotated by `quarters` quarter turns."""
    for _ in range(quarters):
        points = [(-y, x) for x, y in points]
    return points


def _placed(points, scene: Scene, side: int, scale: float = 1.0):
    (cx, cy) = scene.centre
    r = scene.radius * scale
    return [((cx + r * x) * side, (cy + r * y) * side) for x, y in points]


def mask(scene: Scene, size: int) -> np.ndarray:
    """float32 [size, size]: the fraction of every pixel that the shape covers."""
    side = size * OVERSAMPLING
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    draw.polygon(_placed(outline_points(scene.shape), scene, side), fill=255)
    if scene.shape == "ring":
        draw.polygon(_placed(outline_points("circle"), scene, side, 0.5), fill=0)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255.0


def checkers(scene: Scene, size: int) -> np.ndarray:
    """bool [size, size]: the squares of the second colour, 0.4 radii wide; four squares meet at the centre."""
    position = (np.arange(size) + 0.5) / size
    columns, rows = (np.floor((position - middle) / (0.4 * scene.radius)) for middle in scene.centre)
    return (columns[None, :] + rows[:, None]) % 2 == 0


def render(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB image."""
    cover = mask(scene, size)[..., None]
    inside = np.array(COLOURS[scene.colour])
    if scene.second:
        inside = np.where(checkers(scene, size)[..., None], np.array(COLOURS[scene.second]), inside)
    pixels = cover * inside + (1 - cover) * np.array(COLOURS[scene.background])
    return Image.fromarray((pixels + 0.5).astype(np.uint8))


def render_outline(scene: Scene, size: int) -> Image.Image:
    """The outline of the shape, white on black, about 1/30 of the side wide."""
    side = size * OVERSAMPLING
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    width = max(OVERSAMPLING, round(side / 32))
    loops = [_placed(outline_points(scene.shape), scene, side)]
    if scene.shape == "ring":
        loops.append(_placed(outline_points("circle"), scene, side, 0.5))
    for loop in loops:
        draw.line([*loop, *loop[:2]], fill=255, width=width, joint="curve")
    return image.resize((size, size), Image.Resampling.BOX).convert("RGB")


# ---- files ---------------------------------------------------------------------------------------


def make_folder(out: Path, count: int, size: int, seed: int, split: str) -> None:
    """Writes `count` random scenes; equal arguments give equal bytes. Raises as `write_scenes`."""
    rng = np.random.default_rng(seed)
    write_scenes(out, [sample_scene(rng, split) for _ in range(count)], size)


def write_scenes(out: Path, chosen: Iterable[Scene], size: int) -> None:
    """Writes images, outlines and captions of scenes. Raises FileExistsError if `out` is not empty."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new directory")
    rows = []
    for folder in ("images", "conditioning"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(chosen):
        name = f"{number:06d}.png"
        render(scene, size).save(out / "images" / name)
        render_outline(scene, size).save(out / "conditioning" / name)
        row = {
            "image_file_name": f"images/{name}",
            "conditioning_image_file_name": f"conditioning/{name}",
            "text": scene.caption,
        }
        rows.append(json.dumps(row))
    (out / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def make_edits(out: Path, count: int, size: int, seed: int, split: str) -> None:
    """Writes `count` random edits; equal arguments give equal bytes. Raises as `write_scenes`."""
    rng = np.random.default_rng(seed)
    write_edits(out, [sample_edit(rng, split) for _ in range(count)], size)


def write_edits(out: Path, edits: Iterable[Edit], size: int) -> None:
    """Writes targets, sources and instructions of edits. Raises as `write_scenes`."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new directory")
    rows = []
    for folder in ("targets", "sources"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number, edit in enumerate(edits):
        name = f"{number:06d}.png"
        render(edit.target, size).save(out / "targets" / name)
        render(edit.source, size).save(out / "sources" / name)
        row = {"target": f"targets/{name}", "source": f"sources/{name}", "instruction": edit.instruction}
        rows.append(json.dumps(row))
    (out / "metadata.jsonl").write_text("\n".join(rows) + "\n")


SUBJECT = ("red", "white")  # the colours of the checkered circle of demo_flux_lora.py


def make_subject(out: Path, size: int) -> None:
    """Writes six images of the checkered circle, one per other background, with captions in text files."""
    out.mkdir(parents=True, exist_ok=True)
    positions = [(-1, -1), (1, -1), (-1, 1), (1, 1), (-1, -1), (1, 1)]
    for background, (across, down) in zip((name for name in COLOURS if name not in SUBJECT), positions):
        scene = Scene("circle", SUBJECT[0], background, (0.5 + across / 8, 0.5 + down / 8), RADII[1], SUBJECT[1])
        render(scene, size).save(out / f"sks-{background}.png")
        (out / f"sks-{background}.txt").write_text(scene.caption + "\n")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="New or empty directory to write to.")
    parser.add_argument("--count", type=int, default=1000, help="Number of images. Default: 1000.")
    parser.add_argument("--size", type=int, default=64, help="Side of the images in pixels. Default: 64.")
    parser.add_argument("--seed", type=int, default=0, help="Seed; equal seeds give equal bytes. Default: 0.")
    parser.add_argument(
        "--split",
        choices=["train", "held_out", "all"],
        default="train",
        help="Colour and shape pairs to use. Default: train.",
    )
    parser.add_argument("--edits", action="store_true", help="Write pairs with instructions, to train editing.")
    args = parser.parse_args(argv)
    make = make_edits if args.edits else make_folder
    try:
        make(args.out, args.count, args.size, args.seed, args.split)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"wrote {args.count} scenes of the split {args.split} to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
