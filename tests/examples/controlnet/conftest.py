"""What the tests of the Stable Diffusion ControlNet scripts share: both kinds of pipeline in small, pairs, runs in this process."""

import os
import subprocess
from types import SimpleNamespace

import mindspore as ms
import pytest
from conftest import command, load_script

FINAL = "diffusion_pytorch_model.safetensors"
# Two levels of either kind of block instead of four or three: half to compute and compile.
UNETS = {
    "sd15": {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
    "sdxl": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4], "transformer_layers_per_block": [1, 2],
    },
}  # fmt: skip


def make_pipeline(kind, folder, scheduler=None):
    """The small pipeline of a kind in a new folder."""
    maker = load_script("examples/tiny/make_tiny_pipeline.py").KINDS[kind]
    maker(folder, unet={**UNETS[kind], "block_out_channels": [16, 32]}, scheduler=scheduler)
    return folder


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    return {kind: make_pipeline(kind, tmp_path_factory.mktemp("pipeline") / kind) for kind in UNETS}


@pytest.fixture(params=["sd15", "sdxl"])
def sd(request, pipelines):
    """Of one kind: `kind`, `train` and `infer` (the scripts as modules), `root` (the small pipeline)."""
    return of_kind(request.param, pipelines)


@pytest.fixture
def sd15(pipelines):
    """For what both scripts have alike."""
    return of_kind("sd15", pipelines)


@pytest.fixture
def sdxl(pipelines):
    return of_kind("sdxl", pipelines)


def of_kind(kind, pipelines):
    tail = "_sdxl" if kind == "sdxl" else ""
    names = [f"examples/controlnet/{what}_controlnet{tail}.py" for what in ("train", "infer")]
    train, infer = map(load_script, names)
    return SimpleNamespace(kind=kind, train=train, infer=infer, root=pipelines[kind], path=names[0])


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Six pairs of the shapes world, 80 pixels square: pictures, their outlines, captions."""
    folder = tmp_path_factory.mktemp("shapes") / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(folder, 6, 80, seed=0, split="train")
    return folder


@pytest.fixture
def sd_flags(shapes, encoder_cache):
    """sd_flags(sd, out, *more): the command line of a small PyNative run on the shapes; later flags win over earlier ones."""

    def make(sd, out, *more):
        base = [
            "--pretrained_model_name_or_path",
            sd.root,
            "--train_data_dir",
            shapes,
            "--output_dir",
            out,
            "--cache_dir",
            encoder_cache,
        ]
        base += [
            "--resolution",
            64,
            "--seed",
            0,
            "--train_batch_size",
            1,
            "--max_train_steps",
            3,
            "--learning_rate",
            1e-3,
        ]
        base += ["--num_inference_steps", 2, "--num_validation_images", 1, "--mindspore_mode", 1, "--report_to", "none"]
        return [str(part) for part in (*base, *more)]

    return make


@pytest.fixture
def run(sd_flags, monkeypatch):
    """run(sd, out, *flags): trains in this process, which has everything imported: no signals, no exit."""

    def go(sd, out, *more):
        monkeypatch.setattr(sd.train, "StopRequest", lambda: type("Never", (), {"exit_code": None})())
        assert sd.train.main(sd_flags(sd, out, *more)) == 0
        ms.set_context(mode=ms.PYNATIVE_MODE)

    return go


def start(sd, arguments, log):
    """The script in a process of its own."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command(sd.path, arguments), stdout=log, stderr=subprocess.STDOUT, env=environment)
