"""How near is the memory plan to what a run takes? Every setting is a run of a script, three updates, on random
weights.

    python benchmarks/memory_plan.py [--only TEXT]            about twenty minutes on two cores; 7 GB of memory

Reads the prediction and the measured peak (VmHWM of the training process) from run.json. `mid` and `wide` are the sizes
of benchmarks/workload.py: wide has FLUX.1-dev's true blocks. Prints errors, their median and the worst, and writes
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
# Script, pipeline, and the flags of a setting; --mindspore_mode 0 is a graph.
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
    ("controlnet", "mid", "--resolution 256 --num_double_layers 2 --num_single_layers 2"),
    ("controlnet", "mid", "--resolution 512 --num_double_layers 2 --num_single_layers 2 --gradient_checkpointing"),
    (
        "controlnet",
        "mid",
        "--resolution 256 --num_double_layers 2 --num_single_layers 2 --mindspore_mode 1 --use_8bit_adam",
    ),
    ("controlnet", "mid", "--resolution 512 --num_double_layers 2 --num_single_layers 0 --mindspore_mode 1"),
    (
        "controlnet",
        "wide",
        "--resolution 256 --num_double_layers 1 --num_single_layers 0 --mindspore_mode 1 --gradient_checkpointing",
    ),
    ("sdxl", "sdxl", "--resolution 256"),
    ("sdxl", "sdxl", "--resolution 256 --train_batch_size 2 --mindspore_mode 1"),
    ("sdxl", "sdxl", "--resolution 512 --mindspore_mode 1"),
    ("sdxl", "sdxl", "--resolution 512 --mindspore_mode 1 --gradient_checkpointing"),
    ("sd", "sd15", "--resolution 256"),
    ("sd", "sd15", "--resolution 512 --mindspore_mode 1"),
]


def make(work, name):
    """A pipeline, once."""
    if (work / name).exists():
        return
    if name in ("sd15", "sdxl"):
        sd15 = {**UNET, "block_out_channels": [64, 128, 128, 128]}
        return make_sd15(work / name, unet=sd15) if name == "sd15" else make_sdxl(work / name, unet=UNET)
    size = {**workload.FLUX_COMMON, **workload.SIZES[name]["transformer"]}
    make_flux(work / name, transformer=size, clip={"hidden_size": 768}, t5={"d_model": size["joint_attention_dim"]})


def measure(work, script, pipeline, flags):
    """(predicted, measured) in MB."""
    make(work, pipeline)
    words = [
        sys.executable,
        ROOT / SCRIPTS[script],
        "--pretrained_model_name_or_path",
        work / pipeline,
        "--output_dir",
        work / "out",
    ]
    words += [
        "--max_train_steps",
        3,
        "--cache_latents",
        "--cache_dir",
        work / "cache",
        "--seed",
        0,
        "--report_to",
        "none",
    ]
    words += ["--overwrite_output_dir", "--train_batch_size", 1, *flags.split()]
    if script == "lora":
        words += [
            "--instance_data_dir",
            work / "pairs" / "images",
            "--instance_prompt",
            "a circle",
            "--lora_rank",
            workload.RANK,
        ]
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
    parser.add_argument("--only", default="", help="Settings that contain this text alone; keeps no result.")
    only = parser.parse_args().only
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_folder(work / "pairs", 4, 512, seed=0, split="train")
        for script, pipeline, flags in SETTINGS:
            if only in f"{script} {pipeline} {flags}":
                predicted, measured = measure(work, script, pipeline, flags)
                row = {
                    "script": script,
                    "size": pipeline,
                    "flags": flags,
                    "predicted_mb": predicted,
                    "measured_mb": measured,
                }
                found.append({**row, "error": predicted / measured - 1})
                print(
                    f"{script:10s} {pipeline:5s} {predicted:6.0f} of {measured:6.0f} MB ({100 * found[-1]['error']:+5.1f}%)  {flags}",
                    flush=True,
                )
    errors = np.abs([row["error"] for row in found])
    print(f"{len(found)} settings: median error {100 * np.median(errors):.1f}%, worst {100 * errors.max():.1f}%")
    if not only:
        result = {"date": time.strftime("%Y-%m-%d"), "settings": found}
        (ROOT / "benchmarks" / "results" / "memory_plan.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
