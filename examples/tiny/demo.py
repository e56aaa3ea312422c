"""What the demos share: their flags, data, runs of the repository's scripts, and the image grid at the end."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from mindtune.data.grids import image_grid, save_image

ROOT = Path(__file__).resolve().parents[2]


def parse_args(doc, output_dir, steps=None):
    """The flags of a demo: where it writes; with `steps` also the number of updates and of images to generate."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument(
        "--output_dir",
        default=output_dir,
        help="Directory for all results; an earlier run of the demo there is replaced.",
    )
    if steps is None:
        return parser.parse_args()
    parser.add_argument("--max_train_steps", type=int, default=steps, help=f"Number of updates. Default: {steps}.")
    parser.add_argument("--count", type=int, default=48, help="Number of held-out images to generate. Default: 48.")
    return parser.parse_args()


def folder_of(output_dir):
    """The output directory, relative to the repository if it is inside."""
    out = Path(output_dir).resolve()
    return out.relative_to(ROOT) if ROOT in out.parents else out


def run(command, **values):
    """Prints a command as a user would type it and runs it. A list among the values becomes several words."""
    texts = {
        name: shlex.join(map(str, value if isinstance(value, list) else [value])) for name, value in values.items()
    }
    words = shlex.split(command.format(**texts))
    print(f"\n$ python {shlex.join(words)}"[:2000], flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def make_splits(out, make, count, held_out):
    """Writes `count` training samples and `held_out` others by `make`, of shapes.py, in place of old ones."""
    for split, number in (("train", count), ("held_out", held_out)):
        shutil.rmtree(ROOT / out / split, ignore_errors=True)
        make(ROOT / out / split, number, 64, seed=0, split=split)


def rows_of(folder):
    """The rows of a folder's metadata.jsonl; the names of its files become paths."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [
        {key: folder / value if (folder / value).is_file() else value for key, value in row.items()} for row in rows
    ]


def generate(command, out, name, scale, **columns):
    """The images that an inference script makes of the held-out rows, and the rows.

    `columns` are the columns of the lists of words in the command.
    """
    rows = rows_of(ROOT / out / "held_out")
    words = {word: [row[column] for row in rows] for word, column in columns.items()}
    run(command, out=out, name=name, scale=scale, **words)
    return images_of(ROOT / out / "pictures" / f"{name}.png", len(rows)), rows


def save_grid(out, rows):
    """Saves the first ten images or files of each row, by its label."""
    cells = [[Image.open(each) if isinstance(each, Path) else each for each in row[:10]] for row in rows.values()]
    save_image(image_grid(cells, list(rows)), ROOT / out / "pictures" / "grid.png")


def images_of(grid, count):
    """The single images that an inference script wrote beside a grid."""
    return [Image.open(grid.with_name(f"{grid.stem}-{number + 1}.png")) for number in range(count)]
