"""Control-LoRA on a CPU: trains a LoRA with which a small FLUX fills outlines.

    python examples/demo_flux_control_lora.py [--output_dir out/demo-control-lora] [--max_train_steps 1000]

`make demo-control-lora` runs this. The base model, examples/tiny/flux-shapes, draws the shape of a caption at a random
position and size. The demo does what demo_flux_controlnet.py does with a ControlNet: it trains on outlines, generates
images of colour and shape pairs that neither model has seen, and measures the intersection over union of the generated
and the outlined shape, with and without the LoRA.
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

import demo
from evaluate_shapes import overlap
from shapes import make_folder

TRAIN = """examples/flux_control/train_control_lora_flux.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --train_data_dir {out}/train --output_dir {out}/lora
--overwrite_output_dir --cache_dir {out}/cache --resolution 64 --cache_latents --max_sequence_length 12
--lora_rank 64 --train_batch_size 16 --max_train_steps {steps} --learning_rate 2e-3 --lr_scheduler cosine
--lr_warmup_steps 50 --timestep_shift 2.5 --checkpointing_steps 500 --validation_split 0.02 --validation_steps 500
--seed 0"""
INFER = """examples/flux_control/infer_control_lora_flux.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --lora {out}/lora --lora_scale {scale} --prompt {prompts}
--control_image {images} --resolution 64 --num_inference_steps 12 --max_sequence_length 12
--output {out}/pictures/{name}.png --overwrite"""


def generate(out, name, scale):
    """The images for the held-out outlines with the LoRA at `scale`, and the overlap of each with its target."""
    images, rows = demo.generate(INFER, out, name, scale, prompts="text", images="conditioning_image_file_name")
    return images, [overlap(image, Image.open(row["image_file_name"])) for image, row in zip(images, rows)]


def main():
    args = demo.parse_args(__doc__, "out/demo-control-lora", steps=1000)
    out = demo.folder_of(args.output_dir)
    started = time.time()

    demo.make_splits(out, make_folder, 1000, args.count)
    demo.run(TRAIN, out=out, steps=args.max_train_steps)
    trained = time.time() - started

    controlled, controlled_overlap = generate(out, "controlled", 1.0)
    base, base_overlap = generate(out, "base", 0.0)
    rows = demo.rows_of(ROOT / out / "held_out")
    outlines, targets = ([row[f"{key}_file_name"] for row in rows] for key in ("conditioning_image", "image"))
    demo.save_grid(
        out, {"outline": outlines, "with the Control-LoRA": controlled, "target": targets, "base alone": base}
    )
    print(f"\nintersection over union with the outlined shape, {len(rows)} held-out pairs:")
    print(f"  with the Control-LoRA {np.mean(controlled_overlap):.3f}, base alone {np.mean(base_overlap):.3f}")
    print(f"adapter       {out}/lora/pytorch_lora_weights.safetensors")
    print(f"image grid    {out}/pictures/grid.png")
    print(f"curves        tensorboard --logdir {out}/lora/logs")
    print(f"{time.time() - started:.0f} seconds, {trained:.0f} of them training")


if __name__ == "__main__":
    main()
