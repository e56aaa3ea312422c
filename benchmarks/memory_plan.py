"""Compares the memory plan (--dry_run) with the measured peak of training runs.

    python benchmarks/memory_plan.py [--only TEXT]
    python benchmarks/memory_plan.py --ascend [--only TEXT]

Expect twenty minutes on two cores, with 7 GB of memory. Every setting is a run of three updates on random weights;
prediction and measured peak (VmHWM of the training process) are in its run.json. `mid` and `wide` are sizes of
benchmarks/workload.py; wide has blocks of FLUX.1-dev's width. Prints the errors, their median and the worst, and writes
benchmarks/results/memory_plan.json.

With --ascend the peak is that of a simulated Ascend device (ascend_peak.py), for models of the published sizes, without
weights. Expect an hour, with 8 GB of memory; the stand-ins for CANN's libraries must be in build/ascend (python
tests/ascend/build_stand_ins.py build/ascend). Writes benchmarks/results/memory_plan_ascend.json and the table in
docs/memory.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "examples/tiny", "tests/ascend")]

import build_stand_ins
import workload
from make_tiny_pipeline import make_flux, make_sd15, make_sdxl
from published import write_pipeline
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
    ("lora", "mid", "--resolution 512 --adapter dora"),
    ("lora", "mid", "--resolution 512 --adapter dora --mindspore_mode 1"),
    ("lora", "mid", "--resolution 512 --adapter lokr"),
    ("lora", "mid", "--resolution 512 --adapter lokr --mindspore_mode 1"),
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
# With --ascend: script, pipeline of published.py, flags.
SYSTEMS = {"lora": "flux_lora", "controlnet": "flux_controlnet", "sd": "controlnet", "sdxl": "controlnet_sdxl"}
ASCEND_SETTINGS = [
    ("lora", "1 1 1 0", "--resolution 1024 --lora_rank 16"),
    ("lora", "1 1 1 0", "--resolution 1024 --lora_rank 16 --gradient_checkpointing"),
    ("lora", "1 1 1 0", "--resolution 1024 --lora_rank 16 --mindspore_mode 1"),
    ("lora", "1 1 1 0", "--resolution 512 --lora_rank 16"),
    ("lora", "1 1 1 0", "--resolution 512 --lora_rank 16 --gradient_checkpointing"),
    ("lora", "1 1 1 0", "--resolution 512 --lora_rank 16 --mindspore_mode 1"),
    ("lora", "1 2 1 0", "--resolution 512 --lora_rank 16"),
    ("lora", "2 1 1 0", "--resolution 1024 --lora_rank 16"),
    ("lora", "2 1 1 0", "--resolution 512 --lora_rank 16"),
    ("lora", "2 1 1 0", "--resolution 512 --lora_rank 16 --mindspore_mode 1"),
    ("lora", "2 4 1 0", "--resolution 1024 --lora_rank 16 --base_precision int8"),
    ("lora", "2 4 1 0", "--resolution 1024 --lora_rank 16 --gradient_checkpointing --gradient_checkpointing_blocks 3"),
    ("lora", "2 4 1 0", "--resolution 1024 --lora_rank 16 --mindspore_mode 1 --gradient_checkpointing"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --base_precision int8 --gradient_checkpointing"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --gradient_checkpointing"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --mindspore_mode 1"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --mindspore_mode 1 --base_precision int8"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --mindspore_mode 1 --gradient_checkpointing"),
    ("lora", "19 38 4 0", "--resolution 1024 --fit --device_memory_gb 32"),
    (
        "lora",
        "19 38 4 0",
        "--resolution 1024 --lora_rank 16 --gradient_checkpointing --gradient_checkpointing_blocks 28",
    ),
    ("lora", "19 38 4 0", "--resolution 1024 --lora_rank 16 --mindspore_mode 1"),
    ("lora", "19 38 4 0", "--resolution 512 --lora_rank 16 --mindspore_mode 1 --gradient_checkpointing"),
    ("lora", "19 38 4 0", "--resolution 512 --lora_rank 16"),
    ("lora", "19 38 4 0", "--resolution 512 --lora_rank 16 --gradient_checkpointing"),
    ("lora", "19 38 4 0", "--resolution 1024 --lora_rank 16 --mindspore_mode 1 --base_precision int8"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --mixed_precision fp16"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --mixed_precision no"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --train_batch_size 2"),
    ("lora", "2 4 1 0", "--resolution 1024 --lora_rank 16 --adapter dora"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --adapter dora --mindspore_mode 1"),
    ("lora", "2 4 1 0", "--resolution 512 --adapter dora --base_precision int8 --gradient_checkpointing"),
    ("lora", "2 4 1 0", "--resolution 1024 --lora_rank 16 --adapter lokr"),
    ("lora", "2 4 1 0", "--resolution 512 --lora_rank 16 --adapter lokr --mindspore_mode 1"),
    ("lora", "2 4 1 0", "--resolution 512 --adapter lokr --base_precision int8 --gradient_checkpointing"),
    ("controlnet", "2 1 1 0", "--resolution 1024 --mindspore_mode 1"),
    ("controlnet", "2 1 1 0", "--resolution 512"),
    ("controlnet", "2 1 2 0", "--resolution 1024"),
    ("controlnet", "2 1 2 0", "--resolution 1024 --mindspore_mode 1"),
    ("controlnet", "2 1 2 0", "--resolution 512"),
    ("controlnet", "2 1 2 0", "--resolution 512 --mindspore_mode 1"),
    ("controlnet", "19 38 4 0", "--resolution 1024 --mindspore_mode 1"),
    ("controlnet", "19 38 4 0", "--resolution 512"),
    ("controlnet", "19 38 4 0", "--resolution 1024 --gradient_checkpointing --use_8bit_adam --base_precision int8"),
    ("controlnet", "2 1 2 0", "--resolution 512 --use_8bit_adam"),
    ("controlnet", "2 1 2 0", "--resolution 512 --mindspore_mode 1 --use_8bit_adam"),
    ("sd", "sd15", "--resolution 1024"),
    ("sd", "sd15", "--resolution 1024 --gradient_checkpointing"),
    ("sd", "sd15", "--resolution 1024 --mindspore_mode 1"),
    ("sd", "sd15", "--resolution 1024 --mindspore_mode 1 --gradient_checkpointing"),
    ("sd", "sd15", "--resolution 512 --mindspore_mode 1"),
    ("sd", "sd15", "--resolution 512 --mixed_precision fp16"),
    ("sd", "sd15", "--resolution 512 --mixed_precision fp16 --gradient_checkpointing --use_8bit_adam"),
    ("sdxl", "sdxl", "--resolution 1024"),
    ("sdxl", "sdxl", "--resolution 1024 --mindspore_mode 1"),
    ("sdxl", "sdxl", "--resolution 1024 --mindspore_mode 1 --gradient_checkpointing"),
    ("sdxl", "sdxl", "--resolution 1024 --mixed_precision fp16 --gradient_checkpointing --use_8bit_adam"),
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


def simulate(work, script, pipeline, flags):
    """(predicted, peak) of a step on a simulated Ascend device, in MB."""
    folder = work / pipeline.replace(" ", "-")
    write_pipeline(folder, pipeline)
    words = [sys.executable, ROOT / "benchmarks" / "ascend_peak.py", SYSTEMS[script], folder]
    words += ["--mixed_precision", "bf16", "--train_batch_size", 1, *flags.split()]
    environment = {**os.environ, **build_stand_ins.environment(ROOT / "build" / "ascend"), "MS_SIMULATION_LEVEL": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])
    environment["REHEARSE_ASYNCHRONOUSLY"] = "1"
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=work)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["predicted_mb"], found["peak_mb"]


def write_table(found):
    """Puts the settings of --ascend into docs/memory.md."""
    rows = ["| script | size | flags | planned, MB | simulated, MB | error |", "| --- | --- | --- | --- | --- | --- |"]
    for row in found:
        sizes = f"{row['predicted_mb']:,.0f} | {row['measured_mb']:,.0f} | {100 * row['error']:+.1f} %"
        rows.append(f"| {row['script']} | {row['size']} | `{row['flags']}` | {sizes} |")
    page = ROOT / "docs" / "memory.md"
    marked = re.compile("(<!-- simulated peaks -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(marked.sub(lambda match: match[1] + "\n".join(rows) + "\n" + match[2], page.read_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="Run only settings that contain this text, and save no result. Default: all settings.",
    )
    parser.add_argument("--ascend", action="store_true", help="Compare with peaks of a simulated Ascend device.")
    args = parser.parse_args()
    settings, run = (ASCEND_SETTINGS, simulate) if args.ascend else (SETTINGS, measure)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_folder(work / "pairs", 4, 512, seed=0, split="train")
        for script, pipeline, flags in settings:
            if args.only in f"{script} {pipeline} {flags}":
                predicted, measured = run(work, script, pipeline, flags)
                row = {"script": script, "size": pipeline, "flags": flags}
                row.update(predicted_mb=predicted, measured_mb=measured, error=predicted / measured - 1)
                found.append(row)
                sizes = f"{predicted:6.0f} of {measured:6.0f} MB ({100 * row['error']:+5.1f}%)"
                print(f"{script:10s} {pipeline:9s} {sizes}  {flags}", flush=True)
    errors = np.abs([row["error"] for row in found])
    print(f"{len(found)} settings: median error {100 * np.median(errors):.1f}%, worst {100 * errors.max():.1f}%")
    if not args.only:
        result = {"date": time.strftime("%Y-%m-%d"), "settings": found}
        name = "memory_plan_ascend.json" if args.ascend else "memory_plan.json"
        (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
        if args.ascend:
            write_table(found)


if __name__ == "__main__":
    main()
