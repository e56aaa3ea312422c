"""What the tests of the Stable Diffusion ControlNet scripts share: small pipelines, pairs, and runs in this process."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import load_script, run_here, small_run
from small_sd import UNETS, make_pipeline

FINAL = "diffusion_pytorch_model.safetensors"


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


@functools.cache
def scripts(kind):
    """The training and the inference script as modules, and the path of the training script."""
    tail = "_sdxl" if kind == "sdxl" else ""
    names = [f"examples/controlnet/{what}_controlnet{tail}.py" for what in ("train", "infer")]
    return *map(load_script, names), names[0]


def of_kind(kind, pipelines):
    train, infer, path = scripts(kind)
    return SimpleNamespace(kind=kind, train=train, infer=infer, root=pipelines[kind], path=path)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Six pairs of the shapes world, 80 pixels square: pictures, their outlines, captions."""
    folder = tmp_path_factory.mktemp("shapes") / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(folder, 6, 80, seed=0, split="train")
    return folder


@pytest.fixture(scope="session")
def sd_flags(shapes, encoder_cache):
    """sd_flags(sd, out, *more): the command line of a small PyNative run on the shapes. Later flags win."""

    def make(sd, out, *more):
        values = {
            "pretrained_model_name_or_path": sd.root,
            "train_data_dir": shapes,
            "cache_dir": encoder_cache,
            "resolution": 64,
            "learning_rate": 1e-3,
            "num_validation_images": 1,
        }
        return small_run(out, values, *more)

    return make


@pytest.fixture(scope="session")
def run(sd_flags):
    """run(sd, out, *flags): trains in this process and returns `out`."""

    def go(sd, out, *more):
        run_here(sd.train, sd_flags(sd, out, *more))
        return Path(out)

    return go


@pytest.fixture(scope="session")
def finished(run, pipelines, tmp_path_factory):
    """finished(kind, *flags): the output directory of a finished run, not to be changed. The same flags run once."""

    @functools.cache
    def go(kind, *more):
        return run(of_kind(kind, pipelines), tmp_path_factory.mktemp("finished") / "run", *more)

    return go
