"""DreamBooth LoRA on a CPU: trains a small FLUX on six images of a checkered circle, which it has never seen.

    python examples/demo_flux_lora.py [--output_dir out/demo]

`make demo` runs this. The base model, examples/tiny/flux-shapes, was trained on plain shapes. The demo trains an
adapter, generates images with and without it from the same noise, and counts how many show the subject.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

import demo
from evaluate_shapes import is_subject
from shapes import COLOURS, SUBJECT, make_subject

TRAIN = """flux_lora/train_dreambooth_lora_flux.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --instance_data_dir {out}/subject
--output_dir {out}/lora --overwrite_output_dir --resolution 64 --cache_latents --max_sequence_length 12
--train_batch_size 6 --max_train_steps 300 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 20
--lora_rank 16 --timestep_shift 2.5
--checkpointing_steps 100 --seed 0 --validation_prompt "a sks circle on a blue background" --num_inference_steps 12"""
INFER = """flux_lora/infer_flux_lora.py
--pretrained_model_name_or_path examples/tiny/flux-shapes --lora {out}/lora --prompt {prompts}
--num_images_per_prompt 6 --compare --height 64 --width 64 --num_inference_steps 12 --max_sequence_length 12
--output {out}/pictures/grid.png --overwrite"""
PROMPTS = [f"a sks circle on a {background} background" for background in COLOURS if background not in SUBJECT][:3]


def main():
    args = demo.parse_args(__doc__, "out/demo")
    out = demo.folder_of(args.output_dir)
    started = time.time()

    make_subject(ROOT / out / "subject", 64)
    demo.run(TRAIN, out=out)
    demo.run(INFER, out=out, prompts=PROMPTS)

    lines = [json.loads(line) for line in (ROOT / out / "lora" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"\nloss, first and last 20 updates: {np.mean(losses[:20]):.3f} -> {np.mean(losses[-20:]):.3f}")
    # The order of the images: for each prompt six of the base model, then six with the adapter.
    images = demo.images_of(ROOT / out / "pictures" / "grid.png", 12 * len(PROMPTS))
    shown = np.array([is_subject(image, SUBJECT) for image in images])
    rates = shown.reshape(-1, 2, 6).mean((0, 2))
    print(f"images that show the subject:  base {rates[0]:.0%}, adapter {rates[1]:.0%}")
    print(f"adapter       {out}/lora/pytorch_lora_weights.safetensors")
    print(f"image grid    {out}/pictures/grid.png")
    print(f"curves        tensorboard --logdir {out}/lora/logs")
    print(f"{time.time() - started:.0f} seconds")


if __name__ == "__main__":
    main()
