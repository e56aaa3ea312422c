"""The main job in small: DreamBooth LoRA on a cat, with a tiny FLUX, on a CPU.

    python examples/demo_flux_lora.py [--output_dir out/demo]        (make demo)

Writes a tiny FLUX pipeline and six crops of a photograph, trains an adapter, draws with and without it, and says where everything is. The
tiny FLUX has random weights: the run shows that every part works and that the loss falls, not a cat.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CROPS = [(60, 0, 300), (100, 20, 260), (40, 10, 280), (120, 0, 240), (80, 30, 270), (20, 0, 300)]  # left, top, side

TRAIN = """flux_lora/train_dreambooth_lora_flux.py
--pretrained_model_name_or_path {out}/tiny-flux --instance_data_dir {out}/photos --instance_prompt "a photo of sks cat"
--output_dir {out}/lora --overwrite_output_dir --resolution 64 --cache_latents --random_flip --validation_split 0.17
--train_batch_size 2 --max_train_steps 200 --learning_rate 1e-3 --lora_rank 8 --checkpointing_steps 100 --seed 0
--max_sequence_length 64 --validation_prompt "a photo of sks cat" --num_inference_steps 8"""
INFER = """flux_lora/infer_flux_lora.py
--pretrained_model_name_or_path {out}/tiny-flux --lora {out}/lora --prompt "a photo of sks cat" "sks cat on the moon"
--num_images_per_prompt 3 --compare --height 64 --width 64 --num_inference_steps 8 --max_sequence_length 64
--output {out}/pictures/grid.png --overwrite"""


def run(command, out):
    """Prints a command as a user would type it, and runs it."""
    words = shlex.split(command.format(out=shlex.quote(str(out))))
    print(f"\n$ python {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="out/demo", help="Where everything goes; an earlier demo's run there is replaced.")
    out = Path(parser.parse_args().output_dir).resolve()
    out = out.relative_to(ROOT) if ROOT in out.parents else out
    started = time.time()

    (ROOT / out / "photos").mkdir(parents=True, exist_ok=True)
    for number, (left, top, side) in enumerate(CROPS):
        cat = Image.fromarray(skimage.data.chelsea()).crop((left, top, left + side, top + side))
        cat.save(ROOT / out / "photos" / f"cat-{number}.png")
    if not (ROOT / out / "tiny-flux").exists():
        run("examples/tiny/make_tiny_pipeline.py flux {out}/tiny-flux", out)
    run(TRAIN, out)
    run(INFER, out)

    lines = [json.loads(line) for line in (ROOT / out / "lora" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out__loss"] for line in lines if "held_out__loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"\nloss, first and last 20 updates: {np.mean(losses[:20]):.3f} -> {np.mean(losses[-20:]):.3f}")
    print(f"held-out loss, before and after:  {held_out[0]:.3f} -> {held_out[-1]:.3f}")
    print(f"adapter       {out}/lora/pytorch_lora_weights.safetensors")
    print(f"picture grid  {out}/pictures/grid.png (and {out}/lora/samples/final.png)")
    print(f"plot          {out}/lora/loss_by_timestep.png")
    print(f"curves        tensorboard --logdir {out}/lora/logs")
    print(f"{time.time() - started:.0f} seconds")


if __name__ == "__main__":
    main()
