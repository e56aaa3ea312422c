"""One process of the speed benchmark on MindSpore: does the job in a JSON file and prints a line of JSON.

    python benchmarks/step_mindspore.py JOB.json

speed.py starts it. The steps are those of the scripts, built as for the parity check (tests/parity/cases.py). The side
`plain` uses mindone's modules as mindone loads them, without our operators and blocks.
"""

import json
import os
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
from PIL import Image

from mindtune.encode.encoder_stage import EncoderStage
from mindtune.models import configs, execution, library, loading, sampling
from mindtune.run import inference


def memory():
    """Resident memory of this process in MB, now and at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def use_mindone_plainly():
    """From now on, all models of this process are mindone's own and loaded by mindone."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            changes = name == "bind" or name.startswith("use_")  # adds our operators and blocks to a model
            if (changes or name == "load_model") and is_ours(value):
                setattr(module, name, load_plainly if name == "load_model" else lambda model, *_, **__: model)


def is_ours(value):
    """Whether a function, class or object belongs to mindtune."""
    return str(getattr(value, "__module__", None)).startswith("mindtune.")


def load_plainly(root, name, precision=None, variant=None):
    """`loading.load_model` by mindone, in float32."""
    if name.startswith("text_encoder"):
        cls = loading.import_model_class_from_model_name_or_path(root, name)
    else:
        cls = getattr(library.mindone.diffusers, configs.read_config(root, name)["_class_name"])
    model = cls.from_pretrained(str(Path(root) / name), mindspore_dtype=ms.float32, use_safetensors=True)
    return model.set_train(False)


def require_plain(model):
    """Raises AssertionError if `model` has a cell or function of mindtune."""
    cells = [cell for _, cell in model.cells_and_names()]
    found = {type(cell).__name__ for cell in cells if is_ours(cell)}
    found |= {name for cell in cells for name, value in vars(cell).items() if is_ours(value)}
    assert not found, f"the plain side uses mindtune: {found}"


# ---- jobs ----------------------------------------------------------------------------------------


def write(job):
    """Writes the pipeline with random weights and the initial trained weights, which all sides read."""
    root = Path(job["root"])
    size = job["size"]
    if not root.exists():
        if "unet" in size:
            make = make_tiny_pipeline.make_sdxl if job["kind"] == "sdxl" else make_tiny_pipeline.make_sd15
            make(root, unet=size["unet"], scheduler={"prediction_type": "epsilon"})
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
    """Writes a pipeline with the VAE of FLUX.1-dev and random weights."""
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    make_tiny_pipeline.make_flux(Path(job["root"]), vae=vae)
    return {}


def make_step(job):
    """(the step, its batch as tensors) of a job."""
    settings = workload.settings(job["kind"], job["size"])
    arrays = workload.batch(job["kind"], job["size"], job["batch"])
    made = cases.Ours(settings, Path(job["root"]))
    if job["side"] == "plain":
        for cell in made.cells.values():
            require_plain(cell)
    return made.step(), cases.arguments(settings, arrays)


def updates(job):
    """Seconds per update, from the start of the process to the first and second update, and memory."""
    execution.set_up_device(graph_mode=job["mode"] == "graph")
    if job["side"] == "plain":
        use_mindone_plainly()
    step, batch = make_step(job)
    before = memory()
    after = None
    losses = []
    seconds = []
    ends = []
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


def sample(job):
    """Seconds of two equal images by the samplers of the inference scripts, without decoding their latents."""
    execution.set_up_device(graph_mode=False)
    sampling.decode_latents = lambda vae, latents, compute: [latents]
    draw = {"flux_lora": flux_sampler, "sd15": unet_sampler}[job["kind"]](job)
    with execution.pynative():
        return workload.time_images(draw)


def flux_sampler(job):
    """A function that samples with the transformer alone, as flux_lora/infer_flux_lora.py without an adapter."""
    root = Path(job["root"])
    transformer = loading.load_model(root, "transformer", cases.FULL)
    sampler = inference.FluxSampler(
        root, transformer, cases.FULL, None, seed=0, steps=job["steps"], guidance_scale=job["guidance"]
    )
    text = workload.prompt(job["kind"], job["size"])
    height, width = (16 * tokens for tokens in job["size"]["tokens"])
    return lambda: sampler.sample(text, (height, width), 0)


def unet_sampler(job):
    """A function that samples with UNet and ControlNet, as examples/controlnet/infer_controlnet.py."""
    work = Path(job["work"])
    text = workload.prompt(job["kind"], job["size"])
    empty = {name: np.zeros_like(value) for name, value in text.items()}
    stage = EncoderStage(Path(job["root"]), None, "no", work / "cache", job["size"]["text"], system="sd")
    settings = inference.Settings(0, 1, job["steps"], job["guidance"], 1.0)
    sampler = inference.UNetSampler(stage, work / "controlnet", empty, settings)
    condition = Image.fromarray(workload.condition(job["size"]))
    return lambda: sampler.sample(text, condition)[0]


class Product(nn.Cell):
    """A [rows, inputs] times B [inputs, outputs], or times the transpose of B [outputs, inputs]."""

    def __init__(self, rows, inputs, outputs, transposed):
        super().__init__()
        rng = np.random.default_rng(0)
        self.a = ms.Parameter(rng.standard_normal((rows, inputs), dtype=np.float32), name="a")
        shape = (outputs, inputs) if transposed else (inputs, outputs)
        self.b = ms.Parameter(rng.standard_normal(shape, dtype=np.float32), name="b")
        self.product = ops.MatMul(transpose_b=transposed)

    def construct(self):
        return self.product(self.a, self.b)


def rate(job):
    """Shape -> the best of `repeats` rates of a matrix product in graph mode, in operations per second."""
    execution.set_up_device(graph_mode=True)
    found = {}
    for shape in job["shapes"]:
        for transposed in (False, True):
            cell = Product(*shape, transposed)
            times = []
            for _ in range(job["repeats"] + 1):  # the first call compiles
                began = time.perf_counter()
                cell()
                ms.runtime.synchronize()
                times.append(time.perf_counter() - began)
            name = "x".join(map(str, shape)) + (" transposed" if transposed else "")
            found[name] = 2 * np.prod(shape, dtype=float) / min(times[1:])
    return {"rates": found, "best": max(found.values())}


def main(path):
    job = json.loads(Path(path).read_text())
    jobs = {"write": write, "write_vae": write_vae, "updates": updates, "sample": sample, "rate": rate}
    print(json.dumps(jobs[job["do"]](job)), flush=True)
    os._exit(0)  # MindSpore 2.7.1 may crash when it frees its memory at the end, after sampling in PyNative


if __name__ == "__main__":
    main(sys.argv[1])
