"""Memory of ControlNet training: with the size of the data set, and with and without gradient checkpointing.

    python benchmarks/controlnet_memory.py [data] [recompute]

Expect about ten minutes on two cores. Linux only: the peak of the training process's RssAnon is read from /proc every
20 ms. RssAnon leaves out mapped files, which the system can drop at any time.

data: train_controlnet_flux.py on 500 and on 50,000 pairs, memory-mapped and streamed.

recompute: every script with and without --gradient_checkpointing, in graph mode and PyNative; narrow, deep blocks (4 +
8, and 4 + 4 in the ControlNet) on many tokens (1,088, batch 2).
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

from make_tiny_pipeline import make_flux, make_sd15, make_sdxl
from shapes import render, render_outline, sample_scene

SCRIPT = ROOT / "flux_controlnet" / "train_controlnet_flux.py"
LORA = ROOT / "flux_lora" / "train_dreambooth_lora_flux.py"
SD, SDXL = (ROOT / "examples" / "controlnet" / name for name in ("train_controlnet.py", "train_controlnet_sdxl.py"))


def train(pipeline, out, *flags, script=SCRIPT):
    """Runs a training script; (peak RssAnon in MB, the contents of its run.json)."""
    words = [sys.executable, script, "--pretrained_model_name_or_path", pipeline, "--output_dir", out]
    words += ["--report_to", "none", "--seed", 0]
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([str(word) for word in (*words, *flags)], stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                sizes = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
                peak = max([peak, *sizes])
            except OSError:
                pass  # the process has just ended
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(out.with_suffix(".log").read_text()[-3000:])
    return peak / 1024, json.loads((out / "run.json").read_text())


def write_parquet(path, count, side=32):
    """Writes `count` different pairs of `side` pixels as PNG bytes; returns the size of the file in MB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    rows = {"image": [], "conditioning_image": [], "text": []}
    path.parent.mkdir()
    for _ in range(count):
        scene = sample_scene(rng, "all", anywhere=True)
        for column, image in (("image", render(scene, side)), ("conditioning_image", render_outline(scene, side))):
            file = io.BytesIO()
            image.save(file, format="PNG", compress_level=1)
            rows[column].append({"bytes": file.getvalue(), "path": None})
        rows["text"].append(scene.caption)
    pq.write_table(pa.table(rows), path, row_group_size=1000)
    return path.stat().st_size / 2**20


def data(work):
    """Prints the peak memory per size of the data set."""
    make_flux(work / "tiny")
    flags = ["--resolution", 32, "--num_double_layers", 1, "--num_single_layers", 1, "--train_batch_size", 4]
    flags += ["--max_train_steps", 20, "--max_sequence_length", 16, "--mindspore_mode", 1]
    flags += ["--dataloader_num_workers", 2, "--cache_dir", work / "cache"]
    print("pairs    file MB    mapped MB    streamed MB    (peak RssAnon of the training process)")
    for count in (500, 50_000):
        folder = work / str(count)
        size = write_parquet(folder / "train.parquet", count)
        mapped, _ = train(work / "tiny", work / f"{count}-mapped", *flags, "--train_data_dir", folder)
        streamed, _ = train(
            work / "tiny", work / f"{count}-streamed", *flags, "--train_data_dir", folder, "--streaming"
        )
        print(f"{count:6d}   {size:7.1f}    {mapped:9.0f}    {streamed:11.0f}", flush=True)


def recompute(work):
    """Prints the peak memory with and without recomputing; most of it is activations, as in training at full size."""
    narrow = {
        "num_layers": 4,
        "num_single_layers": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
    }
    make_flux(work / "flux", transformer=narrow)
    make_sd15(work / "sd15")
    make_sdxl(work / "sdxl")
    write_parquet(work / "pairs" / "train.parquet", 8, 512)
    images = work / "images"
    images.mkdir()
    for number in range(8):
        scene = sample_scene(np.random.default_rng(number), "all", anywhere=True)
        render(scene, 512).save(images / f"{number}.png")
    common = ["--resolution", 512, "--train_batch_size", 2, "--max_train_steps", 3]
    common += ["--cache_latents", "--cache_dir", work / "cache"]
    text = ["--max_sequence_length", 64]
    pairs = ["--train_data_dir", work / "pairs"]
    scripts = {
        "FLUX LoRA": (LORA, "flux", [*text, "--instance_data_dir", images, "--instance_prompt", "a circle"]),
        "FLUX ControlNet": (SCRIPT, "flux", [*text, *pairs, "--num_double_layers", 4, "--num_single_layers", 4]),
        "SD 1.5 ControlNet": (SD, "sd15", pairs),
        "SDXL ControlNet": (SDXL, "sdxl", pairs),
    }
    head = f"{'':30s}kept MB    recomputed MB    "
    print(head + "(peak RssAnon of the training process)   losses differ by")
    found = {}
    for name, (script, pipeline, flags) in scripts.items():
        for mode_name, mode in (("graph", 0), ("PyNative", 1)):
            peaks = []
            losses = []
            for number, more in enumerate(([], ["--gradient_checkpointing"])):
                out = work / f"{name}-{mode}-{number}"
                line = [*common, *flags, "--mindspore_mode", mode, *more]
                peaks.append(train(work / pipeline, out, *line, script=script)[0])
                losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
            apart = float(np.max(np.abs(np.subtract(*losses)) / losses[0]))
            found[f"{name}, {mode_name}"] = {"kept_mb": peaks[0], "recomputed_mb": peaks[1], "losses_apart": apart}
            print(f"{name:18s} {mode_name:8s} {peaks[0]:10.0f}    {peaks[1]:13.0f}    {apart:.1e}", flush=True)
    (ROOT / "benchmarks" / "results" / "recompute.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["data", "recompute"], help="data, recompute. Default: both.")
    for what in parser.parse_args().what:
        with tempfile.TemporaryDirectory() as folder:
            {"data": data, "recompute": recompute}[what](Path(folder))


if __name__ == "__main__":
    main()
