"""ControlNet in small: teaches a small FLUX to fill outlines, on a CPU.

    python examples/demo_flux_controlnet.py [--output_dir out/demo-controlnet] [--max_train_steps 1000]      (make demo-controlnet)

The base is examples/tiny/flux-shapes, which draws a shape of a caption at some place in some size. The demonstration
trains a ControlNet on outlines, draws pairs of colour and shape that neither has seen, and measures how far the drawn
shape covers the outlined one (intersection over union), with the ControlNet and without.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

from evaluate_shapes import overlap
from shapes import make_folder

from mindtune.data.grids import image_grid, save_image

TRAIN = """flux_controlnet/train_controlnet_flux.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --train_data_dir {out}/train --output_dir {out}/controlnet
--overwrite_output_dir --cache_dir {out}/cache --resolution 64 --cache_latents --max_sequence_length 12
--num_double_layers 2 --num_single_layers 2 --train_batch_size 16 --max_train_steps {steps} --learning_rate 1e-3 --lr_scheduler cosine
--lr_warmup_steps 50 --weighting_scheme none --timestep_shift 2.5 --checkpointing_steps 500 --validation_split 0.02
--validation_steps 500 --seed 0"""
INFER = """flux_controlnet/infer_flux_controlnet.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --controlnet {out}/controlnet --prompt {prompts} --control_image {images}
--controlnet_conditioning_scale {scale} --resolution 64 --num_inference_steps 12 --max_sequence_length 12
--output {out}/pictures/{name}.png --overwrite"""


def run(command, **values):
    """Prints a command as a user would type it, and runs it."""
    words = shlex.split(command.format(**values))
    print(f"\n$ python {shlex.join(words)}"[:2000], flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def held_out(out):
    """(outlines, targets, prompts, the outlines' paths) of the pairs that neither base nor ControlNet has seen."""
    folder = ROOT / out / "held_out"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    outlines, targets = (
        [folder / row[f"{kind}_file_name"] for row in rows] for kind in ("conditioning_image", "image")
    )
    return (
        [Image.open(path) for path in outlines],
        [Image.open(path) for path in targets],
        [row["text"] for row in rows],
        outlines,
    )


def draw(out, name, scale):
    """The held-out pairs drawn with the ControlNet at a strength, and how far each covers the outlined shape."""
    _, targets, prompts, paths = held_out(out)
    run(INFER, out=out, prompts=shlex.join(prompts), images=shlex.join(map(str, paths)), name=name, scale=scale)
    pictures = [Image.open(ROOT / out / "pictures" / f"{name}-{k + 1}.png") for k in range(len(targets))]
    return pictures, [overlap(picture, target) for picture, target in zip(pictures, targets)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir",
        default="out/demo-controlnet",
        help="Where everything goes; an earlier demo's run there is replaced.",
    )
    parser.add_argument("--max_train_steps", type=int, default=1000, help="Updates.")
    parser.add_argument("--count", type=int, default=48, help="Held-out pictures to draw.")
    args = parser.parse_args()
    out = Path(args.output_dir).resolve()
    out = out.relative_to(ROOT) if ROOT in out.parents else out
    started = time.time()

    for split, count in (("train", 1000), ("held_out", args.count)):
        shutil.rmtree(ROOT / out / split, ignore_errors=True)
        make_folder(ROOT / out / split, count, 64, seed=0, split=split)
    run(TRAIN, out=out, steps=args.max_train_steps)
    trained = time.time() - started

    (controlled, covered), (alone, chance) = draw(out, "controlled", 1.0), draw(out, "base", 0.0)
    outlines, targets, _, _ = held_out(out)
    rows = [images[:10] for images in (outlines, controlled, targets, alone)]
    grid = image_grid(rows, ["outline", "with the ControlNet", "target", "base alone"])
    save_image(grid, ROOT / out / "pictures" / "grid.png")
    print(f"\nintersection over union with the outlined shape, {len(targets)} held-out pairs:")
    print(f"  with the ControlNet {np.mean(covered):.3f}, base alone {np.mean(chance):.3f}")
    print(f"ControlNet    {out}/controlnet")
    print(f"picture grid  {out}/pictures/grid.png")
    print(f"curves        tensorboard --logdir {out}/controlnet/logs")
    print(f"{time.time() - started:.0f} seconds, {trained:.0f} of them training")


if __name__ == "__main__":
    main()
