"""What loading a model needs of memory beside its weights, and how long it takes: `models.load_model` and mindone's `from_pretrained`.

    python benchmarks/loading.py            about two minutes on two cores; 2.5 GB in the temporary folder, 4 GB of memory

A random FLUX transformer of 266 million parameters (1.06 GB in float32) is written as float32, in one file and in four, and as bfloat16,
and loaded as either type, each time in a process of its own.

How memory is counted: the process reads RssAnon in /proc/self/status before it loads; from then on its parent reads it every 2 ms. The
growth of the highest reading, by the weights' size as they lie in memory, is `peak`. RssAnon is memory that only the process has: pages of
a mapped file, which the system takes back at will, do not count. `with files` is the growth of VmHWM over the VmRSS before, the same with
those pages. Files are in the system's cache: seconds are those of copying and casting, not of a disk. Linux only.
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
# Type in the files, number of files, type in memory (a --mixed_precision).
CASES = [
    ("float32", 1, "fp32"),
    ("bfloat16", 1, "bf16"),
    ("bfloat16", 1, "fp32"),
    ("float32", 1, "bf16"),
    ("float32", 4, "fp32"),
]


def write_model(folder, kind, shards):
    """A FLUX transformer of random weights in `shards` files, as a pipeline's folder has it: config.json, safetensors, their index."""
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
    stem, rng, weight_map = "diffusion_pytorch_model", np.random.default_rng(0), {}
    for number, part in enumerate(np.array_split(sorted(shapes), shards), 1):
        file = f"{stem}.safetensors" if shards == 1 else f"{stem}-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {str(name): rng.standard_normal(shapes[name], dtype=np.float32).astype(dtype) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if shards > 1:
        maker.write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def transformer_shapes(config):
    """Name -> shape of every parameter of a FLUX transformer, none of them allocated."""
    from mindspore.nn.utils import no_init_parameters

    from mindtune.models import library, named_parameters

    with no_init_parameters():
        model = library.mindone.diffusers.FluxTransformer2DModel(**config)
    return {name: parameter.shape for name, parameter in named_parameters.model_parameters(model).items()}


def status(process="self"):
    """Lines of /proc/PROCESS/status that are a number of kB, in MB."""
    lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[-1] == "kB"}


def load(root, precision_name, way):
    """In a process of its own: loads the transformer; prints the memory before, then what it took, as JSON, and ends."""
    from mindtune.models import execution, library, loading
    from mindtune.models.precision import resolve_precision

    execution.set_up_device(graph_mode=False)
    precision = resolve_precision(precision_name)
    before, start = status(), time.perf_counter()
    print(json.dumps(before), flush=True)
    if way == "ours":
        model = loading.load_model(root, "transformer", precision)
    else:
        folder, cls = os.fspath(root / "transformer"), library.mindone.diffusers.FluxTransformer2DModel
        model = cls.from_pretrained(folder, mindspore_dtype=precision.storage, use_safetensors=True)
    seconds = time.perf_counter() - start
    weights = sum(parameter.size * parameter.itemsize for parameter in model.get_parameters()) / 2**20
    print(
        json.dumps({"weights": weights, "seconds": seconds, "with files": status()["VmHWM"] - before["VmRSS"]}),
        flush=True,
    )
    os._exit(0)  # MindSpore takes a while to take a model apart


def watch(root, precision_name, way):
    """Loads in a child process; its numbers (MB, seconds) with `peak`, the largest growth of its RssAnon."""
    command = [sys.executable, __file__, "--load", str(root), precision_name, way]
    with open(root / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        numbers = (json.loads(line) for line in process.stdout if line.startswith("{"))
        before = highest = next(numbers, {}).get("RssAnon", 0)
        while process.poll() is None:
            with contextlib.suppress(OSError):  # it has just ended
                highest = max(highest, status(process.pid).get("RssAnon", 0))
            time.sleep(0.002)
        if process.returncode:
            raise SystemExit((root / "log").read_text()[-3000:])
    return {**next(numbers), "peak": highest - before}


def measure(cases=CASES):
    """One dict for each case: file, shards, memory (the types), weights (MB), and for both ways peak, with files (MB) and seconds."""
    found = []
    with tempfile.TemporaryDirectory() as work:
        for kind, shards, precision_name in cases:
            root = Path(work, f"{kind}-{shards}")
            if not root.exists():
                write_model(root / "transformer", kind, shards)
            ways = {way: watch(root, precision_name, way) for way in ("ours", "mindone")}
            row = {"file": kind, "shards": shards, "memory": precision_name, "weights": ways["ours"].pop("weights")}
            found.append(
                {**row, **{f"{way} {key}": ways[way][key] for way in ways for key in ("peak", "with files", "seconds")}}
            )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--load", nargs=3, metavar=("ROOT", "PRECISION", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(Path(args.load[0]), *args.load[1:])
    print(
        "                                          ours: peak   with files   seconds     mindone: peak   with files   seconds"
    )
    for row in measure():
        files = "1 file " if row["shards"] == 1 else f"{row['shards']} files"
        print(f"{row['file']:8s} {files} -> {row['memory']}, {row['weights']:5.0f} MB", end="    ")
        for way in ("ours", "mindone"):
            peak, files = (row[f"{way} {key}"] / row["weights"] for key in ("peak", "with files"))
            print(f"  {peak:12.2f}x  {files:10.2f}x  {row[f'{way} seconds']:7.1f}s", end="  ")
        print(flush=True)


if __name__ == "__main__":
    main()
