"""Time, memory and communication of data-parallel training with 1, 2 and 3 processes on one machine.

    python benchmarks/workers.py [--updates 60]

Trains a LoRA and a ControlNet on examples/tiny/flux-shapes under msrun, with the same batch on each rank. Prints
seconds per update, images per second, memory of rank 0, bytes of optimizer state, and bytes per update between all
ranks. These bytes are counted on the loopback device of a network namespace (`unshare`; None where it is not permitted)
and include more than gradients. msrun itself keeps a core busy: with fewer cores than processes and msrun need, the
times show how cores are shared, not the cost of a rank. Writes benchmarks/results/workers.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples/tiny/flux-shapes"
CONTROLNET = "flux_controlnet/train_controlnet_flux.py --train_data_dir {pairs} --num_double_layers 1"
JOBS = {
    "LoRA, rank 4": "flux_lora/train_dreambooth_lora_flux.py --instance_data_dir {images} --instance_prompt x",
    "ControlNet 1 + 1": f"{CONTROLNET} --num_single_layers 1",
    "ControlNet 1 + 1, ZeRO 1": f"{CONTROLNET} --num_single_layers 1 --zero_stage 1",
}


def loopback_bytes(pid):
    """Bytes sent by the loopback device in the network namespace of a process."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    return 0


def find_worker(out):
    """The process id of a worker of the job that writes to `out`, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (folder / "cmdline").read_text() and "MS_ROLE=MS_WORKER" in (folder / "environ").read_text():
                return folder.name
        except OSError:
            pass
    return None


def updates_of(out):
    """The number of updates logged so far."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def measure(words, workers, updates, out, own_network):
    """Runs a job and returns its measurements."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [str(Path(sys.executable).with_name("msrun")), f"--worker_num={workers}", f"--local_worker_num={workers}"]
    line += ["--join=True", f"--log_dir={out}.workers", *words, "--distributed"]
    if own_network:
        line = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *line]
    with open(f"{out}.console", "w") as console:
        process = subprocess.Popen(line, stdout=console, stderr=subprocess.STDOUT, env=environment, cwd=out.parent)
        marks = []
        for mark in (updates // 3, updates - 2):
            while updates_of(out) < mark and process.poll() is None:
                time.sleep(0.01)
            worker = find_worker(out)
            marks.append((updates_of(out), loopback_bytes(worker) if worker else 0))
        if process.wait() != 0:
            sys.exit(Path(f"{out}.console").read_text()[-3000:])
    run = json.loads((out / "run.json").read_text())
    said = Path(f"{out}.console").read_text()
    (before, sent), (after, sent_after) = marks
    counted = own_network and after > before
    return {
        "workers": workers,
        "seconds_per_update": round(run["seconds_per_step"], 3),
        "images_per_second": round(workers * run["flags"]["train_batch_size"] / run["seconds_per_step"], 1),
        "first_worker_mb": run["peak_memory_mb"]["training_process"],
        "state_bytes": int(said.split("optimizer state: ")[1].split(" bytes")[0].replace(",", "")),
        "trained_bytes": 4 * sum(run["trainable"].values()),
        "bytes_between_workers": round((sent_after - sent) / (after - before)) if counted else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=60, help="Number of updates per run. Default: 60.")
    updates = parser.parse_args().updates
    own_network = subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sys.path.insert(0, str(ROOT / "examples/tiny"))
        import shapes

        shapes.make_folder(folder / "pairs", 12, 64, seed=0, split="train")
        shared = f"--pretrained_model_name_or_path {BASE} --cache_dir {folder}/cache --resolution 64"
        shared += f" --max_sequence_length 12 --seed 0 --train_batch_size 4 --max_train_steps {updates}"
        shared += " --cache_latents --report_to none"
        for name, words in JOBS.items():
            results[name] = []
            for workers in (1, 2, 3):
                out = folder / f"{len(results)}-{workers}"
                line = str(ROOT / words.format(images=folder / "pairs/images", pairs=folder / "pairs")).split()
                found = measure([*line, *shared.split(), "--output_dir", str(out)], workers, updates, out, own_network)
                results[name].append(found)
                print(name, found, flush=True)
    record = {"cores": os.cpu_count(), "updates": updates, "runs": results}
    (ROOT / "benchmarks/results/workers.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
