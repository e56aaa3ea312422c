"""One process of the speed benchmark on MindSpore (speed.py starts it): does the job that a JSON file describes, prints
a line of JSON.

    python benchmarks/step_mindspore.py JOB.json

The steps are the scripts' own, put together as the parity check puts them together (tests/parity/cases.py). The side
`plain` has mindone's modules as mindone loads them, without our operators and blocks.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "tests/parity", "examples/tiny", "flux_lora")]

import cases
import make_tiny_pipeline
import mindspore as ms
import numpy as np
import workload
from mindspore import nn, ops

from mindtune.models import configs, execution, library, loading


def memory():
    """Resident memory of this process in MB, now and at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def use_mindone_plainly():
    """From here on models are mindone's own, loaded by mindone, whoever of us loads them."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            changes = name == "bind" or name.startswith("use_")  # puts our operators and blocks into a model
            if (changes or name == "load_model") and is_ours(value):
                setattr(module, name, load_plainly if name == "load_model" else lambda model, *_, **__: model)


def is_ours(value):
    """True for a function, class or object of the package's."""
    return str(getattr(value, "__module__", None)).startswith("mindtune.")


def load_plainly(root, name, precision=None, variant=None):
    if name.startswith("text_encoder"):
        cls = loading.import_model_class_from_model_name_or_path(root, name)
    else:
        cls = getattr(library.mindone.diffusers, configs.read_config(root, name)["_class_name"])
    return cls.from_pretrained(str(Path(root) / name), mindspore_dtype=ms.float32, use_safetensors=True).set_train(
        False
    )


def require_plain(model):
    """Raises AssertionError if a cell or function of ours is left in `model`."""
    cells = [cell for _, cell in model.cells_and_names()]
    found = {type(cell).__name__ for cell in cells if is_ours(cell)}
    found |= {name for cell in cells for name, value in vars(cell).items() if is_ours(value)}
    assert not found, f"the plain side has something of ours: {found}"


# ---- jobs ----------------------------------------------------------------------------------------


def write(job):
    """The pipeline with random weights, and what trains at its start, read by all sides."""
    root, size = Path(job["root"]), job["size"]
    if not root.exists():
        if "unet" in size:
            make_tiny_pipeline.make_sd15(root, unet=size["unet"], scheduler={"prediction_type": "epsilon"})
        else:
            transformer = {**workload.FLUX_COMMON, **size["transformer"]}
            encoders = {
                "clip": {"hidden_size": transformer["pooled_projection_dim"]},
                "t5": {"d_model": transformer["joint_attention_dim"]},
            }
            make_tiny_pipeline.make_flux(root, transformer=transformer, **encoders)
    work = Path(job["work"])
    work.mkdir(parents=True)
    cases.Ours(workload.settings(job["kind"], size), root).save(work)
    return {}


def write_vae(job):
    """A pipeline whose VAE is as wide as FLUX.1-dev's, of random weights."""
    make_tiny_pipeline.make_flux(
        Path(job["root"]),
        vae={"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32},
    )
    return {}


def make_step(job):
    """(the step, its batch as tensors) of a job; of the plain side checked to be plain."""
    settings, size = workload.settings(job["kind"], job["size"]), job["size"]
    arrays = workload.batch(job["kind"], size, job["batch"])
    made = cases.Ours(settings, Path(job["root"]))
    if job["side"] == "plain":
        for cell in made.cells.values():
            require_plain(cell)
    return made.step(), cases.arguments(settings, arrays)


def updates(job):
    """Seconds of single updates, of the way there from the start of the process, and memory."""
    execution.set_up_device(graph_mode=job["mode"] == "graph")
    if job["side"] == "plain":
        use_mindone_plainly()
    step, batch = make_step(job)
    before, losses, seconds, ends, after = memory(), [], [], [], None
    for _ in range(job["warmup"] + job["updates"]):
        began = time.perf_counter()
        losses.append(float(step(*batch)[1]))
        seconds.append(time.perf_counter() - began)
        ends.append(time.time() - job["started"])
        after = after or memory()
    return {
        "update": float(np.median(seconds[job["warmup"] :])),
        "all": seconds,
        "first": ends[0],
        "second": ends[1],
        "losses": losses,
        "loaded_mb": before["now"],
        "graph_mb": after["peak"] - before["peak"],
        "peak_mb": memory()["peak"],
    }


class Product(nn.Cell):
    """A [rows, inputs] times B [outputs, inputs] transposed, or B [inputs, outputs]."""

    def __init__(self, rows, inputs, outputs, transposed):
        super().__init__()
        rng = np.random.default_rng(0)
        self.a = ms.Parameter(rng.standard_normal((rows, inputs), dtype=np.float32), name="a")
        self.b = ms.Parameter(
            rng.standard_normal((outputs, inputs) if transposed else (inputs, outputs), dtype=np.float32), name="b"
        )
        self.product = ops.MatMul(transpose_b=transposed)

    def construct(self):
        return self.product(self.a, self.b)


def rate(job):
    """shape -> the best of `repeats` rates of one matrix product in a graph, operations a second."""
    execution.set_up_device(graph_mode=True)
    found = {}
    for shape in job["shapes"]:
        for transposed in (False, True):
            cell, times = Product(*shape, transposed), []
            for _ in range(job["repeats"] + 1):  # the first one compiles
                began = time.perf_counter()
                cell()
                ms.runtime.synchronize()
                times.append(time.perf_counter() - began)
            found["x".join(map(str, shape)) + (" transposed" if transposed else "")] = (
                2 * np.prod(shape, dtype=float) / min(times[1:])
            )
    return {"rates": found, "best": max(found.values())}


def main(path):
    job = json.loads(Path(path).read_text())
    print(json.dumps({"write": write, "write_vae": write_vae, "updates": updates, "rate": rate}[job["do"]](job)))


if __name__ == "__main__":
    main(sys.argv[1])
