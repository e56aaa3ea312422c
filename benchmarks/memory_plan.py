"""Compares the memory plan (--dry_run) with the measured peak of training runs.

    python benchmarks/memory_plan.py [--only TEXT]

Expect twenty minutes on two cores, with 7 GB of memory. Every setting is a run of three updates on random weights;
prediction and measured peak (VmHWM of the training process) are in its run.json. `mid` and `wide` are sizes of
benchmarks/workload.py; wide has blocks of FLUX.1-dev's width. Prints the errors, their median and the worst, and writes
benchmarks/results/memory_plan.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "examples/tiny")]

import workload
from make_tiny_pipeline import make_flux, make_sd15, make_sdxl
from shapes import make_folder

SCRIPTS = {
    "lora": "flux_lora/train_dreambooth_lora_flux.py",
    "controlnet": "flux_controlnet/train_controlnet_flux.py",
    "sd": "examples/controlnet/train_controlnet.py",
    "sdxl": "examples/controlnet/train_controlnet_sdxl.py",
}
UNET = {"block_out_channels": [64, 128, 128], "norm_num_groups": 32}
MID_BLOCKS = "--num_double_layers 2 --num_single_layers 2"
WIDE_BLOCKS = "--num_double_layers 1 --num_single_layers 0"
# Script, pipeline, flags. --mindspore_mode 0, the default, is graph mode.
SETTINGS = [
    ("lora", "mid", "--resolution 256"),
    ("lora", "mid", "--resolution 256 --train_batch_size 4"),
    ("lora", "mid", "--resolution 512"),
    ("lora", "mid", "--resolution 512 --gradient_checkpointing"),
    ("lora", "mid", "--resolution 512 --mindspore_mode 1"),
    ("lora", "mid", "--resolution 512 --mindspore_mode 1 --gradient_checkpointing"),
    ("lora", "mid", "--resolution 256 --train_batch_size 4 --mindspore_mode 1"),
    ("lora", "wide", "--resolution 256"),
    ("lora", "wide", "--resolution 512"),
    ("lora", "wide", "--resolution 512 --base_precision int8 --gradient_checkpointing"),
    ("lora", "wide", "--resolution 512 --mindspore_mode 1"),
    ("controlnet", "mid", f"--resolution 256 {MID_BLOCKS}"),
    ("controlnet", "mid", f"--resolution 512 {MID_BLOCKS} --gradient_checkpointing"),
    ("controlnet", "mid", f"--resolution 256 {MID_BLOCKS} --mindspore_mode 1 --use_8bit_adam"),
    ("controlnet", "mid", "--resolution 512 --num_double_layers 2 --num_single_layers 0 --mindspore_mode 1"),
    ("controlnet", "wide", f"--resolution 256 {WIDE_BLOCKS} --mindspore_mode 1 --gradient_checkpointing"),
    ("sdxl", "sdxl", "--resolution 256"),
    ("sdxl", "sdxl", "--resolution 256 --train_batch_size 2 --mindspore_mode 1"),
    ("sdxl", "sdxl", "--resolution 512 --mindspore_mode 1"),
    ("sdxl", "sdxl", "--resolution 512 --mindspore_mode 1 --gradient_checkpointing"),
    ("sd", "sd15", "--resolution 256"),
    ("sd", "sd15", "--resolution 512 --mindspore_mode 1"),
]


def make(work, name):
    """Writes the pipeline `name` unless it exists."""
    if (work / name).exists():
        return
    if name in ("sd15", "sdxl"):
        sd15 = {**UNET, "block_out_channels": [64, 128, 128, 128]}
        return make_sd15(work / name, unet=sd15) if name == "sd15" else make_sdxl(work / name, unet=UNET)
    size = {**workload.FLUX_COMMON, **workload.SIZES[name]["transformer"]}
    make_flux(work / name, transformer=size, clip={"hidden_size": 768}, t5={"d_model": size["joint_attention_dim"]})


def measure(work, script, pipeline, flags):
    """(predicted, measured) peak of a run, in MB."""
    make(work, pipeline)
    words = [sys.executable, ROOT / SCRIPTS[script], "--pretrained_model_name_or_path", work / pipeline]
    words += ["--output_dir", work / "out", "--overwrite_output_dir", "--cache_dir", work / "cache"]
    words += ["--max_train_steps", 3, "--cache_latents", "--seed", 0, "--report_to", "none"]
    words += ["--train_batch_size", 1, *flags.split()]
    if script == "lora":
        words += ["--instance_data_dir", work / "pairs" / "images", "--instance_prompt", "a circle"]
        words += ["--lora_rank", workload.RANK]
    else:
        words += ["--train_data_dir", work / "pairs"]
    if pipeline in workload.SIZES:
        words += ["--max_sequence_length", workload.SIZES[pipeline]["text"]]
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    memory = json.loads((work / "out" / "run.json").read_text())["memory"]
    return memory["predicted_mb"], memory["measured_mb"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="Run only settings that contain this text, and save no result. Default: all settings.",
    )
    only = parser.parse_args().only
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_folder(work / "pairs", 4, 512, seed=0, split="train")
        for script, pipeline, flags in SETTINGS:
            if only in f"{script} {pipeline} {flags}":
                predicted, measured = measure(work, script, pipeline, flags)
                row = {"script": script, "size": pipeline, "flags": flags}
                row.update(predicted_mb=predicted, measured_mb=measured, error=predicted / measured - 1)
                found.append(row)
                sizes = f"{predicted:6.0f} of {measured:6.0f} MB ({100 * row['error']:+5.1f}%)"
                print(f"{script:10s} {pipeline:5s} {sizes}  {flags}", flush=True)
    errors = np.abs([row["error"] for row in found])
    print(f"{len(found)} settings: median error {100 * np.median(errors):.1f}%, worst {100 * errors.max():.1f}%")
    if not only:
        result = {"date": time.strftime("%Y-%m-%d"), "settings": found}
        (ROOT / "benchmarks" / "results" / "memory_plan.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
