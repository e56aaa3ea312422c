"""What the tests share: a tiny FLUX pipeline, photographs, and the LoRA script as a module and as a command."""

import functools
import gc
import importlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Each of several test processes keeps to one core, with all that it starts: MindSpore's idle threads wait actively,
# which on a core of the others would take a third of their time.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):  # Linux
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

import mindspore as ms
import numpy as np
import pytest
import skimage.data
from fake_hub import FakeHub
from fake_modelscope import DOMAIN, FakeModelScope
from msrun_job import Job
from PIL import Image
from safetensors.numpy import load_file, save_file

from mindtune.encode import child, encoder_stage, jobs
from mindtune.models import controlnets, execution, loading

execution.set_up_device(graph_mode=False)  # before the first operator: blocking launches cannot be had later

ROOT = Path(__file__).resolve().parents[1]
TRAINING_SCRIPTS = [
    "flux_lora/train_dreambooth_lora_flux.py",
    "flux_controlnet/train_controlnet_flux.py",
    "examples/controlnet/train_controlnet.py",
    "examples/controlnet/train_controlnet_sdxl.py",
    "examples/flux_kontext/train_lora_flux_kontext.py",
    "examples/flux_control/train_control_lora_flux.py",
]
# These take half a minute or more: `make test` starts with them, so that no core waits for the last of them alone.
SLOW_FILES = [
    "flux_lora/test_workers.py",
    "ascend/test_rehearse.py",
    "examples/controlnet/test_run.py",
    "examples/controlnet/test_step.py",
    "flux_controlnet/test_step.py",
    "test_readme.py",
    "flux_lora/test_resume.py",
    "examples/controlnet/test_resume.py",
    "parity/test_golden.py",
    "flux_controlnet/test_run.py",
    "flux_lora/test_step.py",
    "mindtune/models/test_adapted_layers.py",
    "examples/test_control_learning.py",
    "flux_controlnet/test_resume.py",
    "examples/test_learning.py",
    "real/test_sd.py",
    "mindtune/models/test_loading.py",
    "mindtune/models/test_int8.py",
    "mindtune/optim/test_adam8bit.py",
    "flux_lora/test_lora_buckets.py",
    "flux_controlnet/test_workers.py",
    "examples/controlnet/test_workers.py",
    "test_launch.py",
    "flux_lora/test_run.py",
    "flux_lora/test_concepts.py",
    "flux_lora/test_bad_input.py",
    "real/test_sdxl.py",
    "mindtune/models/test_flux_blocks.py",
    "examples/controlnet/test_infer.py",
    "mindtune/test_doctor.py",
]


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
    """Splits a component's weights into two files with an index, as those of large models are."""
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


@pytest.fixture(scope="session")
def small_flux(tiny_flux, tmp_path_factory):
    """The tiny pipeline with one transformer block of each kind: half to compute and compile, the same encoders."""
    folder = shutil.copytree(tiny_flux, tmp_path_factory.mktemp("pipeline") / "small") / "transformer"
    edit(folder / "config.json", num_layers=1, num_single_layers=1)
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: value for name, value in load_file(weights).items() if "transformer_blocks.1." not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder.parent


@pytest.fixture
def pipeline(tiny_flux, tmp_path):
    """A copy that a test may change."""
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
def fake_modelscope(monkeypatch, tmp_path_factory):
    """A ModelScope of our own that the modelscope library asks in this process, without its pauses and bars."""
    api, utils, bars = (
        importlib.import_module(f"modelscope.hub.{name}") for name in ("api", "utils.utils", "callback")
    )
    hub = FakeModelScope()
    monkeypatch.setenv("MODELSCOPE_DOMAIN", DOMAIN)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path_factory.mktemp("modelscope")))
    for name in ("MODELSCOPE_API_TOKEN", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", hub.proxy)
    for module in (api, utils):
        monkeypatch.setattr(module, "MODELSCOPE_URL_SCHEME", "http://")
    monkeypatch.setattr(api.ModelScopeConfig, "path_credential", str(tmp_path_factory.mktemp("credentials")))
    monkeypatch.setattr(bars, "tqdm", functools.partial(bars.tqdm, disable=True))  # it never closes them
    monkeypatch.setattr("urllib3.util.Retry.sleep", lambda *_: None)
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def flags(small_flux, photos, encoder_cache):
    """flags(out, *more): the command line of a small PyNative run on the photographs. Later flags win."""

    def make(out, *more):
        values = {
            "pretrained_model_name_or_path": small_flux,
            "instance_data_dir": photos,
            "instance_prompt": "a photo of sks cat",
            "cache_dir": encoder_cache,
            "max_sequence_length": 16,
        }
        return small_run(out, values, *more)

    return make


def small_run(out, values, *more):
    """The command line of three updates on small images in PyNative. `values` win over these flags, and `more` wins."""
    common = {
        "output_dir": out,
        "resolution": 32,
        "seed": 0,
        "train_batch_size": 1,
        "max_train_steps": 3,
        "num_inference_steps": 2,
        "mindspore_mode": 1,
        "report_to": "none",
    }
    return command_line({**common, **values}, *more)


def command_line(values, *more):
    """--name value ... of a dict, and then `more`, as strings."""
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    return [str(word) for word in (*words, *more)]


# ---- runs ----------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items):
    """Puts the tests of SLOW_FILES first."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    """Keeps the garbage collector off what stays to the end anyway: modules and tests.

    Every run calls it when it has loaded its models. In between it would take a quarter of the time of building them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


class NoStopRequest:
    """Stands in for `cli.StopRequest` in runs inside of pytest, which keeps its own signal handlers."""

    exit_code = None


@pytest.fixture(scope="session", autouse=True)
def keep_signal_handlers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindtune.run.record.StopRequest", NoStopRequest)
        yield


run_in_child = encoder_stage.run_in_child


def encode_here(job):
    """Stands in for the encoder stage's child process. The job is sent as to the child; the mode is kept."""
    mode = ms.get_context("mode")
    with pytest.MonkeyPatch.context() as patch:
        stdin = io.BytesIO()
        jobs.send(job, stdin)
        stdin.seek(0)
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=stdin))
        patch.setattr(child, "_end_with_parent", lambda parent: None)
        child.main()
    ms.set_context(mode=mode)


@functools.cache
def keep_imports(script):
    """What the first run of a script has imported stays to the end, too: later collections leave it out."""
    gc.collect()
    gc.freeze()


def run_here(script, arguments):
    """Runs a script, a module, to its end in this process, which has imported everything.

    The report has no curves: they take half a second, and test_report.py and runs in processes of their own draw them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindtune.run.report._plot", lambda *_: "")
        if encoder_stage.run_in_child is run_in_child:  # and not what a test put there
            patch.setattr(encoder_stage, "run_in_child", encode_here)
        try:
            assert script.main([str(word) for word in arguments]) == 0
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
    keep_imports(script)


@pytest.fixture
def learning(monkeypatch):
    """benchmarks/learning.py, which then trains in this process."""
    module = load_script("benchmarks/learning.py")

    def run(words, *flags):
        script, *arguments = shlex.split(words)
        run_here(load_script(script), [*arguments, *flags])

    monkeypatch.setattr(module, "run", run)
    monkeypatch.chdir(ROOT)
    return module


class StageWithoutEncoders:
    """Stands in for an encoder stage in tests of batches: images as an `EncoderStage` makes them, zeros for text.

    `captions` are those that were asked for, in order. `moments` (sample, size, flip) stands in for cached latents.
    """

    interpolation = "lanczos"
    image = encoder_stage.EncoderStage.image

    def __init__(self, moments=None):
        self.captions = []
        self.moments = moments

    def text(self, caption):
        self.captions.append(caption)
        return {"prompt_embeds": np.zeros((16, 32), np.float32), "pooled_prompt_embeds": np.zeros(32, np.float32)}


@pytest.fixture(scope="session")
def lora(lora_script, flags):
    """lora(out, *flags): runs the LoRA script in this process and returns `out`."""

    def run(out, *more):
        run_here(lora_script, flags(out, *more))
        return Path(out)

    return run


@pytest.fixture(scope="session")
def finished_lora(lora, tmp_path_factory):
    """finished_lora(*flags): the output directory of a finished run, not to be changed. The same flags run once."""
    return functools.cache(lambda *more: lora(tmp_path_factory.mktemp("finished") / "run", *more))


@pytest.fixture
def loaded(monkeypatch):
    """The names of the models that runs in this process load, without those of the encoder stage."""
    names, load_model = [], loading.load_model

    def note(root, name, *more):
        names.append(name)
        return load_model(root, name, *more)

    def encode(job):
        count = len(names)
        encode_here(job)
        del names[count:]

    for module in (loading, controlnets):
        monkeypatch.setattr(module, "load_model", note)
    monkeypatch.setattr(encoder_stage, "run_in_child", encode)
    return names


def command(script, arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run_command(script, arguments, check=0, **settings):
    """Runs a script in a process of its own, as a user does; the finished process, with stdout and stderr in one."""
    done = subprocess.run(
        command(script, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **settings,
    )
    assert done.returncode == check, done.stdout[-4000:]
    return done


@pytest.fixture(scope="session")
def train(flags):
    """train(out, *flags, check=0): the LoRA script in a process of its own, which must exit with `check`."""

    def run(out, *more, **settings):
        return run_command("flux_lora/train_dreambooth_lora_flux.py", flags(out, *more), **settings)

    return run


@pytest.fixture
def job(tmp_path):
    """job(script, workers, out, arguments, **names): a running `Job`; what is left at the test's end is killed."""
    jobs = []

    def start(*arguments, **names):
        jobs.append(Job(*arguments, **names))
        return jobs[-1]

    yield start
    for each in jobs:
        each.kill()


def metrics(out):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
