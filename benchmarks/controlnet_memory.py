"""What ControlNet training needs of memory: does it grow with the data set, and does gradient checkpointing recompute?

    python benchmarks/controlnet_memory.py [data] [recompute]            about ten minutes on two cores

data: train_controlnet_flux.py on 500 and on 50,000 pairs, memory-mapped and streamed; the peak of the training
process's own memory (RssAnon: mapped files, which the system takes back at will, apart), read from /proc every 20 ms.
Linux only. recompute: training thin, deep blocks (4 + 8, and 4 + 4 in the ControlNet) on many tokens (1,088, batch 2),
with and without --gradient_checkpointing, in graph mode and PyNative; the same peak.
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
from shapes import render_outline, sample_scene, render

SCRIPT = ROOT / "flux_controlnet" / "train_controlnet_flux.py"
LORA = ROOT / "flux_lora" / "train_dreambooth_lora_flux.py"
SD, SDXL = (ROOT / "examples" / "controlnet" / name for name in ("train_controlnet.py", "train_controlnet_sdxl.py"))


def train(pipeline, out, *flags, script=SCRIPT):
    """Runs a script; (peak RssAnon in MB, its run.json)."""
    words = [
        sys.executable,
        script,
        "--pretrained_model_name_or_path",
        pipeline,
        "--output_dir",
        out,
        "--report_to",
        "none",
        "--seed",
        0,
    ]
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([str(word) for word in (*words, *flags)], stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(
                    peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0
                )
            except OSError:
                pass  # it has just ended
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(out.with_suffix(".log").read_text()[-3000:])
    return peak / 1024, json.loads((out / "run.json").read_text())


def write_parquet(path, count, side=32):
    """`count` pairs of `side` pixels, each picture different, as the bytes of PNG files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rows = np.random.default_rng(0), {"image": [], "conditioning_image": [], "text": []}
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
    make_flux(work / "tiny")
    flags = [
        "--resolution",
        32,
        "--num_double_layers",
        1,
        "--num_single_layers",
        1,
        "--train_batch_size",
        4,
        "--max_train_steps",
        20,
    ]
    flags += [
        "--max_sequence_length",
        16,
        "--mindspore_mode",
        1,
        "--dataloader_num_workers",
        2,
        "--cache_dir",
        work / "cache",
    ]
    print("pairs    file MB    mapped MB    streamed MB    (peak RssAnon of the training process)")
    for count in (500, 50_000):
        size = write_parquet(work / str(count) / "train.parquet", count)
        found = [
            train(work / "tiny", work / f"{count}-{len(more)}", *flags, "--train_data_dir", work / str(count), *more)[0]
            for more in ([], ["--streaming"])
        ]
        print(f"{count:6d}   {size:7.1f}    {found[0]:9.0f}    {found[1]:11.0f}", flush=True)


def recompute(work):
    """Thin and deep blocks on many tokens: activations, not weights, are what memory goes to, as in training at full size."""
    thin = {
        "num_layers": 4,
        "num_single_layers": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
    }
    make_flux(work / "flux", transformer=thin)
    make_sd15(work / "sd15")
    make_sdxl(work / "sdxl")
    write_parquet(work / "pairs" / "train.parquet", 8, 512)
    (work / "pictures").mkdir()
    for number in range(8):
        render(sample_scene(np.random.default_rng(number), "all", anywhere=True), 512).save(
            work / "pictures" / f"{number}.png"
        )
    common = [
        "--resolution",
        512,
        "--train_batch_size",
        2,
        "--max_train_steps",
        3,
        "--cache_latents",
        "--cache_dir",
        work / "cache",
    ]
    text, pairs = ["--max_sequence_length", 64], ["--train_data_dir", work / "pairs"]
    kinds = {
        "FLUX LoRA": (LORA, "flux", [*text, "--instance_data_dir", work / "pictures", "--instance_prompt", "a circle"]),
        "FLUX ControlNet": (SCRIPT, "flux", [*text, *pairs, "--num_double_layers", 4, "--num_single_layers", 4]),
        "SD 1.5 ControlNet": (SD, "sd15", pairs),
        "SDXL ControlNet": (SDXL, "sdxl", pairs),
    }
    print(
        "                              kept MB    recomputed MB    (peak RssAnon of the training process)   losses differ by"
    )
    found = {}
    for name, (script, pipeline, flags) in kinds.items():
        for mode_name, mode in (("graph", 0), ("PyNative", 1)):
            peaks, losses = [], []
            for number, more in enumerate(([], ["--gradient_checkpointing"])):
                out = work / f"{name}-{mode}-{number}"
                peaks.append(
                    train(work / pipeline, out, *common, *flags, "--mindspore_mode", mode, *more, script=script)[0]
                )
                losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
            apart = float(np.max(np.abs(np.subtract(*losses)) / losses[0]))
            found[f"{name}, {mode_name}"] = {"kept_mb": peaks[0], "recomputed_mb": peaks[1], "losses_apart": apart}
            print(f"{name:18s} {mode_name:8s} {peaks[0]:10.0f}    {peaks[1]:13.0f}    {apart:.1e}", flush=True)
    (ROOT / "benchmarks" / "results" / "recompute.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["data", "recompute"], help="data, recompute; default: both.")
    for what in parser.parse_args().what:
        with tempfile.TemporaryDirectory() as folder:
            {"data": data, "recompute": recompute}[what](Path(folder))


if __name__ == "__main__":
    main()
