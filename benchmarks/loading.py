"""Memory and time of loading a model: our `load_model` and mindone's `from_pretrained`.

    python benchmarks/loading.py

Expect two minutes on two cores, with 2.5 GB in the temporary directory and 4 GB of memory. Linux only. A random FLUX
transformer of 266 million parameters (1.06 GB in float32) is written as float32, in one file and in four, and as
bfloat16, and loaded as either dtype, each time in a process of its own.

`peak` is the growth of the process's RssAnon while it loads, divided by the size of the weights in memory: the process
reads /proc/self/status before it loads, and its parent reads it every 2 ms. RssAnon leaves out the pages of mapped
files, which the system can drop at any time; `with files`, the growth of VmHWM over VmRSS, includes them. The files are
in the system's cache, so that the seconds are those of copying and casting.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

WIDE = {
    "num_layers": 3,
    "num_single_layers": 9,
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
}
WIDE.update(joint_attention_dim=4096, pooled_projection_dim=768)
# Dtype in the files, number of files, dtype in memory (a --mixed_precision).
CASES = [
    ("float32", 1, "fp32"),
    ("bfloat16", 1, "bf16"),
    ("bfloat16", 1, "fp32"),
    ("float32", 1, "bf16"),
    ("float32", 4, "fp32"),
]


def write_model(folder, kind, shards):
    """Writes a random FLUX transformer as in a pipeline: config.json, `shards` safetensors files and their index."""
    import ml_dtypes
    from safetensors.numpy import save_file

    spec = importlib.util.spec_from_file_location(
        "make_tiny_pipeline", ROOT / "examples" / "tiny" / "make_tiny_pipeline.py"
    )
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    config = {**maker.FLUX_TRANSFORMER, **WIDE}
    shapes = transformer_shapes(config)
    folder.mkdir(parents=True)
    maker.write_json(folder / "config.json", maker.hub_header("FluxTransformer2DModel") | config)
    dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[kind]
    stem = "diffusion_pytorch_model"
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, part in enumerate(np.array_split(sorted(shapes), shards), 1):
        file = f"{stem}.safetensors" if shards == 1 else f"{stem}-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {str(name): rng.standard_normal(shapes[name], dtype=np.float32).astype(dtype) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if shards > 1:
        maker.write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def transformer_shapes(config):
    """Name -> shape of every parameter of a FLUX transformer; none is allocated."""
    from mindspore.nn.utils import no_init_parameters

    from mindtune.models import library, named_parameters

    with no_init_parameters():
        model = library.mindone.diffusers.FluxTransformer2DModel(**config)
    return {name: parameter.shape for name, parameter in named_parameters.model_parameters(model).items()}


def status(process="self"):
    """The sizes in /proc/PROCESS/status by name, in MB."""
    lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[-1] == "kB"}


def load(root, precision_name, way):
    """Runs in a process of its own: prints the memory before loading and the results after it as JSON, and exits."""
    from mindtune.models import execution, library, loading
    from mindtune.models.precision import resolve_precision

    execution.set_up_device(graph_mode=False)
    precision = resolve_precision(precision_name)
    before = status()
    start = time.perf_counter()
    print(json.dumps(before), flush=True)
    if way == "ours":
        model = loading.load_model(root, "transformer", precision)
    else:
        folder = os.fspath(root / "transformer")
        cls = library.mindone.diffusers.FluxTransformer2DModel
        model = cls.from_pretrained(folder, mindspore_dtype=precision.storage, use_safetensors=True)
    seconds = time.perf_counter() - start
    weights = sum(parameter.size * parameter.itemsize for parameter in model.get_parameters()) / 2**20
    with_files = status()["VmHWM"] - before["VmRSS"]
    print(json.dumps({"weights": weights, "seconds": seconds, "with files": with_files}), flush=True)
    os._exit(0)  # MindSpore takes long to free a model


def watch(root, precision_name, way):
    """Loads in a child process; its results (MB, seconds) with `peak`, the largest growth of its RssAnon."""
    command = [sys.executable, __file__, "--load", str(root), precision_name, way]
    with open(root / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        numbers = (json.loads(line) for line in process.stdout if line.startswith("{"))
        before = highest = next(numbers, {}).get("RssAnon", 0)
        while process.poll() is None:
            with contextlib.suppress(OSError):  # the process has just ended
                highest = max(highest, status(process.pid).get("RssAnon", 0))
            time.sleep(0.002)
        if process.returncode:
            raise SystemExit((root / "log").read_text()[-3000:])
    return {**next(numbers), "peak": highest - before}


def measure(cases=CASES):
    """One dict per case: file, shards, memory, weights (MB), and per loader its peak, with files (MB) and seconds."""
    found = []
    with tempfile.TemporaryDirectory() as work:
        for kind, shards, precision_name in cases:
            root = Path(work, f"{kind}-{shards}")
            if not root.exists():
                write_model(root / "transformer", kind, shards)
            ways = {way: watch(root, precision_name, way) for way in ("ours", "mindone")}
            row = {"file": kind, "shards": shards, "memory": precision_name, "weights": ways["ours"].pop("weights")}
            for way, result in ways.items():
                row.update({f"{way} {key}": result[key] for key in ("peak", "with files", "seconds")})
            found.append(row)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--load", nargs=3, metavar=("ROOT", "PRECISION", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(Path(args.load[0]), *args.load[1:])
    print(f"{'':42s}ours: peak   with files   seconds     mindone: peak   with files   seconds")
    for row in measure():
        files = "1 file " if row["shards"] == 1 else f"{row['shards']} files"
        print(f"{row['file']:8s} {files} -> {row['memory']}, {row['weights']:5.0f} MB", end="    ")
        for way in ("ours", "mindone"):
            peak, files = (row[f"{way} {key}"] / row["weights"] for key in ("peak", "with files"))
            print(f"  {peak:12.2f}x  {files:10.2f}x  {row[f'{way} seconds']:7.1f}s", end="  ")
        print(flush=True)


if __name__ == "__main__":
    main()
