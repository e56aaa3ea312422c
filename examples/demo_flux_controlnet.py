"""ControlNet in small: teaches a small FLUX to fill outlines, on a CPU.

    python examples/demo_flux_controlnet.py [--output_dir out/demo-controlnet] [--max_train_steps 1500]      (make demo-controlnet)

The base is examples/tiny/flux-shapes, which draws a shape of a caption at some place in some size. The demonstration trains a
ControlNet on outlines, draws pairs of colour and shape that neither has seen, and measures how far the drawn shape covers the outlined
one (intersection over union), with the ControlNet and without.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

from evaluate_shapes import overlap  # noqa: E402  (scripts beside this one)
from shapes import make_folder  # noqa: E402

from mindtune.sampling import image_grid, save_image  # noqa: E402

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


def draw(out, rows, name, scale):
    """The pictures of `rows` of the held-out folder, drawn with the ControlNet at a strength."""
    prompts, images = (
        shlex.join(row["text"] for row in rows),
        shlex.join(f"{out}/held_out/{row['conditioning_image_file_name']}" for row in rows),
    )
    run(INFER, out=out, prompts=prompts, images=images, name=name, scale=scale)
    return [Image.open(ROOT / out / "pictures" / f"{name}-{k + 1}.png") for k in range(len(rows))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir", default="out/demo-controlnet", help="Where everything goes; an earlier demo's run there is replaced."
    )
    parser.add_argument("--max_train_steps", type=int, default=1500, help="Updates.")
    parser.add_argument("--count", type=int, default=24, help="Held-out pictures to draw.")
    args = parser.parse_args()
    out = Path(args.output_dir).resolve()
    out = out.relative_to(ROOT) if ROOT in out.parents else out
    started = time.time()

    for split, count in (("train", 1000), ("held_out", args.count)):
        if not (ROOT / out / split).exists():
            make_folder(ROOT / out / split, count, 64, seed=0, split=split)
    run(TRAIN, out=out, steps=args.max_train_steps)
    trained = time.time() - started

    rows = [json.loads(line) for line in (ROOT / out / "held_out" / "metadata.jsonl").read_text().splitlines()]
    outlines, targets = (
        [Image.open(ROOT / out / "held_out" / row[f"{kind}_file_name"]) for row in rows] for kind in ("conditioning_image", "image")
    )
    with_it, without = draw(out, rows, "controlled", 1.0), draw(out, rows, "base", 0.0)
    columns = [[*picture] for picture in zip(outlines, with_it, targets, without)][:12]
    labels = ["outline", "with the ControlNet", "target", "base alone"]
    grid = save_image(image_grid([list(row) for row in zip(*columns)], labels), ROOT / out / "pictures" / "grid.png")
    scores = [np.mean([overlap(picture, target) for picture, target in zip(drawn, targets)]) for drawn in (with_it, without)]
    print(f"\nintersection over union with the outlined shape, {len(rows)} held-out pairs: {scores[0]:.3f}, base alone {scores[1]:.3f}")
    print(f"ControlNet    {out}/controlnet")
    print(f"picture grid  {grid}")
    print(f"curves        tensorboard --logdir {out}/controlnet/logs")
    print(f"{time.time() - started:.0f} seconds, {trained:.0f} of them training")


if __name__ == "__main__":
    main()
