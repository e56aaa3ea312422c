"""Resident memory of the training process when the encoders run in a child process, and in two other ways.

    python benchmarks/encoder_memory.py [--mode 0|1]

Expect about four minutes on two cores. train_dreambooth_lora_flux.py trains a tiny transformer with large encoders (the
VAE of FLUX.1-dev, a CLIP of 0.1 GB and a T5 of 0.4 GB, random weights) and cached text and latents, each way in a new
process:

    ours     the encoders run in a child process of the script, as always
    deleted  the training process loads them, encodes, casts them to fp16 and deletes them, then trains
    held     the training process loads them, encodes and keeps them, then trains
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # graph mode looks the source of a module up by its name
    spec.loader.exec_module(module)
    return module


def make_pipeline(folder):
    """Writes the tiny pipeline with large encoders; returns their size in MB."""
    maker = load(ROOT / "examples" / "tiny" / "make_tiny_pipeline.py")
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}  # FLUX.1-dev's
    maker.make_flux(folder, vae=vae, clip={"intermediate_size": 200_000}, t5={"d_ff": 262_144, "num_layers": 4})
    encoders = [folder / part for part in ("text_encoder", "text_encoder_2", "vae")]
    return sum(path.stat().st_size for part in encoders for path in part.glob("*.safetensors")) / 2**20


def make_photos(folder):
    import skimage.data
    from PIL import Image

    folder.mkdir()
    for number in range(4):
        crop = Image.fromarray(skimage.data.chelsea()).crop((20 * number, 0, 20 * number + 300, 300))
        crop.resize((96, 96)).save(folder / f"{number}.png")


def train(way, work, mode):
    """Runs in a process of its own: one training run, the encoders as `way` says. Prints its memory as JSON."""
    import mindspore as ms

    from mindtune.encode import child, encoder_stage

    kept = []

    def in_process(job):
        """Does the job of the child in this process; every encoder that is loaded is kept in `kept`."""
        real = child.load_model
        encoder_stage.load_model = child.load_model = lambda *a, **k: kept.append(real(*a, **k)) or kept[-1]
        child.encode_images(job.stage, job.images)
        child.encode_captions(job.stage, job.captions())
        encoder_stage.load_model = child.load_model = real
        if way == "deleted":
            for cell in kept:
                for parameter in cell.get_parameters():
                    parameter.set_dtype(ms.float16)
            kept.clear()

    if way != "ours":
        encoder_stage.run_in_child = in_process
    script = load(ROOT / "flux_lora" / "train_dreambooth_lora_flux.py")
    flags = ["--pretrained_model_name_or_path", f"{work}/pipeline", "--instance_data_dir", f"{work}/photos"]
    flags += ["--instance_prompt", "a photo of sks cat", "--output_dir", f"{work}/{way}", "--resolution", 64]
    flags += ["--cache_latents", "--max_sequence_length", 64, "--train_batch_size", 2, "--max_train_steps", 20]
    flags += ["--seed", 0, "--mindspore_mode", mode, "--report_to", "none"]
    script.main([str(flag) for flag in flags])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    adapter = Path(work, way, "pytorch_lora_weights.safetensors").read_bytes()
    memory = {"peak": int(status["VmHWM"].split()[0]) // 1024, "end": int(status["VmRSS"].split()[0]) // 1024}
    print(json.dumps({**memory, "adapter": hashlib.sha256(adapter).hexdigest()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", type=int, choices=[0, 1], default=0, help="0: graph mode, 1: PyNative. Default: 0.")
    parser.add_argument("--way", choices=["ours", "deleted", "held"], help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return train(args.way, args.work, args.mode)

    with tempfile.TemporaryDirectory() as work:
        size = make_pipeline(Path(work, "pipeline"))
        make_photos(Path(work, "photos"))
        results = {}
        for way in ("ours", "deleted", "held"):
            command = [sys.executable, __file__, "--way", way, "--work", work, "--mode", str(args.mode)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[way] = json.loads(done.stdout.splitlines()[-1])
    assert len({r["adapter"] for r in results.values()}) == 1, "the three ways must train the same adapter"
    print(f"size of the encoders on disk: {size:.0f} MB; mode {args.mode}; {platform.platform()}, {platform.machine()}")
    for way, result in results.items():
        print(f"{way:8s} peak {result['peak']:6d} MB   after training {result['end']:6d} MB")
    saved = results["held"]["peak"] - results["ours"]["peak"]
    print(f"peak, held - ours: {saved} MB, {saved / size:.2f} times the encoders' size")
    return 0 if saved >= size else 1


if __name__ == "__main__":
    sys.exit(main())
