"""Trains a LoRA on FLUX.1-dev's transformer at its full size on a CPU: 11.9 billion random weights, loaded as int8.

    python benchmarks/full_size.py [--work FOLDER] [--try]

Expect half an hour on two cores, with 24 GB of disk and of memory. Linux only.

Writes the transformer (19 + 38 blocks, width 3072) in bfloat16, in the sharded layout of the hub, with FLUX.1-dev's VAE
and small encoders of the right output widths (768 and 4096). flux_lora/train_dreambooth_lora_flux.py then trains a LoRA
of rank 16 at 256 pixels (256 image and 512 text tokens) with --base_precision int8 and --gradient_checkpointing in
graph mode. The RssAnon of its process, which leaves out mapped files, is read every 50 ms. --try uses 2 + 4 narrow
blocks. The pipeline is deleted at the end.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from loading import status, transformer_shapes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

import make_tiny_pipeline as maker

FLUX_DEV = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
}
FLUX_DEV.update(joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True)
NARROW = {**FLUX_DEV, "num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
SHARD = 2 << 30  # bytes


def write_pipeline(root, transformer):
    """Writes the pipeline; returns the numbers of parameters and of shards of the transformer."""
    maker.make_flux(root, vae=VAE, clip={"hidden_size": 768}, t5={"d_model": 4096})
    folder = root / "transformer"
    shutil.rmtree(folder)
    folder.mkdir()
    config = {**maker.FLUX_TRANSFORMER, **transformer}
    maker.write_json(folder / "config.json", maker.hub_header("FluxTransformer2DModel") | config)
    shapes = transformer_shapes(config)
    shards = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * np.prod(shape) > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * np.prod(shape)
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: shapes[name] for name in names}, rng)
        weight_map.update(dict.fromkeys(names, file))
        print(f"wrote {file}", flush=True)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    maker.write_json(index, {"metadata": {}, "weight_map": weight_map})
    return int(sum(np.prod(shape) for shape in shapes.values())), len(shards)


def write_shard(path, shapes, rng):
    """Writes random matrices that keep the scale of activations, norms of 1 and biases of 0, one tensor at a time."""
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) == 2:
                value = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
            else:
                value = np.full(shape, float(name.endswith("weight")), np.float32)
            file.write(value.astype(ml_dtypes.bfloat16).tobytes())


def make_photos(folder):
    import skimage.data
    from PIL import Image

    folder.mkdir()
    Image.fromarray(skimage.data.chelsea()).crop((0, 0, 300, 300)).save(folder / "0.png")


def train(work, updates):
    """Runs the training script; its time, memory and updates, and the last lines that it printed if it failed."""
    words = [sys.executable, ROOT / "flux_lora/train_dreambooth_lora_flux.py"]
    words += ["--pretrained_model_name_or_path", work / "pipeline", "--instance_data_dir", work / "photos"]
    words += ["--instance_prompt", "a photo of sks cat", "--output_dir", work / "out", "--base_precision", "int8"]
    words += ["--gradient_checkpointing", "--resolution", 256, "--cache_latents", "--train_batch_size", 1]
    words += ["--lora_rank", 16, "--max_train_steps", updates, "--seed", 0, "--report_to", "none"]
    words += ["--mindspore_mode", 0]
    log = work / "log"
    began = time.time()
    peak = 0.0
    loaded = None
    with open(log, "w") as out:
        process = subprocess.Popen([str(word) for word in words], stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                now = status(process.pid).get("RssAnon", 0.0)
            except OSError:  # the process has just ended
                break
            peak = max(peak, now)
            if loaded is None and "updates," in log.read_text(errors="replace"):  # the line before the first update
                loaded = {"seconds": time.time() - began, "peak_mb": peak}
            time.sleep(0.05)
    process.wait()
    found = {"exit_code": process.returncode, "seconds": time.time() - began, "peak_mb": peak, "loaded": loaded}
    metrics = work / "out" / "metrics.jsonl"
    found["updates"] = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    if process.returncode:
        found["printed"] = log.read_text(errors="replace")[-2000:]
        return found
    run = json.loads((work / "out" / "run.json").read_text())
    keys = ("seconds_to_first_update", "seconds_per_step", "peak_memory_mb", "memory", "trainable")
    return {**found, **{key: run.get(key) for key in keys}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="Directory for 24 GB of weights. Default: a temporary one.")
    parser.add_argument("--updates", type=int, default=2, help="Number of updates. Default: 2.")
    parser.add_argument("--try", dest="tried", action="store_true", help="Use 2 + 4 narrow blocks and save no result.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        began = time.time()
        parameters, shards = write_pipeline(work / "pipeline", NARROW if args.tried else FLUX_DEV)
        make_photos(work / "photos")
        written = time.time() - began
        cores = len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.M))
        found = {
            "parameters": parameters,
            "shards": shards,
            "seconds_to_write": written,
            "date": time.strftime("%Y-%m-%d"),
        }
        found.update(machine=f"{cores} cores, {platform.machine()}", **train(work, args.updates))
    print(json.dumps(found, indent=1))
    if not args.tried:
        (ROOT / "benchmarks" / "results" / "full_size.json").write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
