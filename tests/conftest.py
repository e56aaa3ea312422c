"""What the tests share: a tiny FLUX pipeline, photographs, and the training script as a module and as a command."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import skimage.data
from fake_hub import FakeHub
from msrun_job import Job
from PIL import Image
from safetensors.numpy import load_file, save_file

from mindtune.models import execution

execution.set_up_device(graph_mode=False)  # before the first operator: blocking launches cannot be had later

ROOT = Path(__file__).resolve().parents[1]


def load_script(relative):
    """A script of the repository as a module, by its path."""
    spec = importlib.util.spec_from_file_location(Path(relative).stem, ROOT / relative)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, stem="diffusion_pytorch_model", index=None, middle=""):
    """Splits a component's weights into two files with an index, as large models come."""
    single = folder / f"{stem}.safetensors"
    tensors = sorted(load_file(single).items())
    names = [f"{stem}{middle}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    halves = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    for name, half in zip(names, halves):
        save_file(dict(half), folder / name, metadata={"format": "pt"})
    single.unlink()
    weight_map = {key: name for name, half in zip(names, halves) for key, _ in half}
    content = json.dumps({"metadata": {"total_size": sum(v.nbytes for _, v in tensors)}, "weight_map": weight_map})
    (folder / (index or f"{stem}.safetensors.index.json")).write_text(content)
    return names


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """A complete FLUX pipeline directory with small random weights."""
    out = tmp_path_factory.mktemp("pipeline") / "flux"
    load_script("examples/tiny/make_tiny_pipeline.py").make_flux(out, seed=0)
    return out


@pytest.fixture
def pipeline(tiny_flux, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_flux, tmp_path / "flux")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Five photographs, none square, the shorter side 72 to 104 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    pictures = [
        skimage.data.chelsea(),
        skimage.data.coffee(),
        skimage.data.rocket(),
        skimage.data.astronaut()[:, 90:420],
    ]
    pictures.append(skimage.data.chelsea()[20:260, 90:300])
    for number, pixels in enumerate(pictures):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        scale = (72 + 8 * number) / min(image.size)
        image.resize((round(image.width * scale), round(image.height * scale))).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def lora_script():
    return load_script("flux_lora/train_dreambooth_lora_flux.py")


@pytest.fixture(scope="session")
def encoder_cache(tmp_path_factory):
    """Encoder outputs shared by the whole session: they are named by content, so runs cannot confuse them."""
    return tmp_path_factory.mktemp("encoder-cache")


@pytest.fixture(params=[0, 1], ids=["graph", "pynative"])
def mode(request):
    """Runs a test in graph mode and in PyNative."""
    before = ms.get_context("mode")
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=before)


@pytest.fixture
def fake_hub(monkeypatch):
    """A hub of our own that HF_ENDPOINT points to, for this process and those that it starts."""
    hub = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)  # what it read from there when it was imported
    yield hub
    hub.close()


@pytest.fixture
def flags(tiny_flux, photos, encoder_cache):
    """flags(out, *more): the command line of a small PyNative run on the photographs; later flags win over earlier ones."""

    def make(out, *more):
        base = [
            "--pretrained_model_name_or_path",
            tiny_flux,
            "--instance_data_dir",
            photos,
            "--instance_prompt",
            "a photo of sks cat",
        ]
        base += [
            "--output_dir",
            out,
            "--cache_dir",
            encoder_cache,
            "--resolution",
            32,
            "--max_sequence_length",
            16,
            "--seed",
            0,
        ]
        base += [
            "--train_batch_size",
            1,
            "--max_train_steps",
            3,
            "--mindspore_mode",
            1,
            "--num_inference_steps",
            2,
            "--report_to",
            "none",
        ]
        return [str(part) for part in (*base, *more)]

    return make


def command(script, arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


@pytest.fixture
def train(flags):
    """train(out, *flags): runs the LoRA script as a user does, in a process of its own; gives the finished process."""

    def run(out, *more, check=0, **settings):
        done = subprocess.run(
            command("flux_lora/train_dreambooth_lora_flux.py", flags(out, *more)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **settings,
        )  # fmt: skip
        if check is not None:
            assert done.returncode == check, done.stdout[-4000:]
        return done

    return run


@pytest.fixture
def job(tmp_path):
    """job(script, workers, out, arguments): a running `Job`; what is left of it at the test's end is killed."""
    jobs = []

    def start(script, workers, out, arguments):
        jobs.append(Job(script, workers, out, arguments))
        return jobs[-1]

    yield start
    for each in jobs:
        for pid in each.processes():
            os.kill(pid, 9)


@pytest.fixture
def alone(monkeypatch):
    """alone(script, arguments): a training script with one worker, in this process: no signals, no exit."""

    def run(script, arguments):
        module = load_script(script)
        monkeypatch.setattr(module, "StopRequest", lambda: type("Never", (), {"exit_code": None})())
        assert module.main([str(part) for part in arguments]) == 0
        ms.set_context(mode=ms.PYNATIVE_MODE)

    return run


def metrics(out):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
