"""Editing on a CPU: trains a LoRA with which a small FLUX recolours shapes and backgrounds, as an instruction says.

    python examples/demo_flux_kontext.py [--output_dir out/demo-kontext] [--max_train_steps 2500]

`make demo-kontext` runs this. The base model, examples/tiny/flux-shapes, draws shapes from captions and has never read
a source image. The demo trains it on pairs with instructions such as "make the shape red", edits images of colour and
shape pairs that neither model has seen, and counts how many have both colours right and keep the shape.
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

import demo
from evaluate_shapes import is_edit
from shapes import make_edits

PAIRS, UPDATES = 4000, 2500
TRAIN = """examples/flux_kontext/train_lora_flux_kontext.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --train_data_dir {out}/train --image_column target
--conditioning_image_column source --caption_column instruction --output_dir {out}/lora --overwrite_output_dir
--cache_dir {out}/cache --resolution 64 --cache_latents --max_sequence_length 16 --lora_layers all-linear
--lora_rank 64 --train_batch_size 16 --max_train_steps {steps} --learning_rate 2e-3 --lr_scheduler cosine
--lr_warmup_steps 50 --timestep_shift 2.5 --checkpointing_steps 500 --validation_split 0.005 --validation_steps 1000
--seed 0"""
INFER = """examples/flux_kontext/infer_flux_kontext.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --lora {out}/lora --lora_scale {scale} --prompt {prompts}
--image {sources} --resolution 64 --num_inference_steps 12 --guidance_scale 3.5 --max_sequence_length 16
--output {out}/pictures/{name}.png --overwrite"""


def generate(out, name, scale):
    """The edited images of the held-out sources with the LoRA at `scale`, and whether each is right."""
    images, rows = demo.generate(INFER, out, name, scale, prompts="instruction", sources="source")
    return images, [is_edit(image, Image.open(row["target"])) for image, row in zip(images, rows)]


def main():
    args = demo.parse_args(__doc__, "out/demo-kontext", steps=UPDATES)
    out = demo.folder_of(args.output_dir)
    started = time.time()

    demo.make_splits(out, make_edits, PAIRS, args.count)
    demo.run(TRAIN, out=out, steps=args.max_train_steps)
    trained = time.time() - started

    edited, right = generate(out, "edited", 1.0)
    base, base_right = generate(out, "base", 0.0)
    rows = demo.rows_of(ROOT / out / "held_out")
    sources, targets = ([row[key] for row in rows] for key in ("source", "target"))
    demo.save_grid(out, {"source": sources, "edited with the LoRA": edited, "target": targets, "base alone": base})
    print(f"\nboth colours right and the shape kept, {len(right)} held-out sources:")
    print(f"  with the LoRA {np.mean(right):.0%}, base alone {np.mean(base_right):.0%}")
    print(f"adapter       {out}/lora/pytorch_lora_weights.safetensors")
    print(f"image grid    {out}/pictures/grid.png")
    print(f"curves        tensorboard --logdir {out}/lora/logs")
    print(f"{time.time() - started:.0f} seconds, {trained:.0f} of them training")


if __name__ == "__main__":
    main()
