"""What the tests on published pipelines share: each in small, pairs, and the training scripts in this process."""

import functools
import json
import shutil
from pathlib import Path

import conftest
import pytest
import real_pipelines
from conftest import command_line, metrics, run_here

from mindtune.cli import UserError
from mindtune.encode import encoder_stage
from mindtune.models import loading

SCRIPTS = {
    "flux_lora": "flux_lora/train_dreambooth_lora_flux.py",
    "flux_controlnet": "flux_controlnet/train_controlnet_flux.py",
    "sd": "examples/controlnet/train_controlnet.py",
    "sdxl": "examples/controlnet/train_controlnet_sdxl.py",
    "flux_kontext": "examples/flux_kontext/train_lora_flux_kontext.py",
    "flux_control": "examples/flux_control/train_control_lora_flux.py",
    "flux_fill": "examples/flux_control/train_control_lora_flux.py",
}
load_script = functools.cache(conftest.load_script)


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """real(name, **options): the folder of a small published pipeline, VAE or ControlNet, not to be changed."""
    made = {}

    def get(name, **options):
        key = (name, str(options))
        if key not in made:
            folder = tmp_path_factory.mktemp("real") / name.replace(" ", "-")
            if name in real_pipelines.PIPELINES:
                made[key] = real_pipelines.make(name, folder, **options)
            else:
                make = real_pipelines.make_vae if name in real_pipelines.VAES else real_pipelines.make_controlnet
                made[key] = make(name, folder, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Three pairs of the shapes world, 80 pixels square: images, their outlines, captions."""
    folder = tmp_path_factory.mktemp("shapes") / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(folder, 3, 80, seed=0, split="train")
    return folder


@pytest.fixture
def encode_here(monkeypatch):
    """The encoder stage in this process, which has imported everything."""
    monkeypatch.setattr(encoder_stage, "run_in_child", conftest.encode_here)


@pytest.fixture(scope="session")
def line(pairs, photos, encoder_cache):
    """line(script, root, out, *more): the command line of a run of one update; later flags win over earlier ones."""

    def make(script, root, out, *more):
        values = {
            "pretrained_model_name_or_path": root,
            "output_dir": out,
            "cache_dir": encoder_cache,
            "seed": 0,
            "train_batch_size": 1,
            "max_train_steps": 1,
            "learning_rate": 1e-3,
            "mindspore_mode": 1,
            "report_to": "none",
        }
        words = command_line(values)
        words += ["--resolution", 32 if script.startswith("flux") else 64, "--num_inference_steps", 1]
        if script.startswith("flux"):
            words += ["--max_sequence_length", 16]
        if script == "flux_lora":
            words += ["--instance_data_dir", photos, "--instance_prompt", "a photo of sks cat"]
        else:
            words += ["--train_data_dir", pairs]
        if script == "flux_fill":
            words += ["--fill", "--conditioning_image_column", "conditioning_image"]
        if script == "flux_controlnet":
            words += ["--num_double_layers", 1, "--num_single_layers", 1]
        return [str(word) for word in (*words, *more)]

    return make


@pytest.fixture(scope="session")
def run(line):
    """run(script, root, out, *more): trains in this process and returns the losses that the run has logged."""

    def go(script, root, out, *more):
        run_here(load_script(SCRIPTS[script]), line(script, root, out, *more))
        return [row["loss"] for row in metrics(out) if "loss" in row]

    return go


@pytest.fixture(scope="session")
def plain_losses(run, tmp_path_factory):
    """plain_losses(script, root): the losses of a run without more flags. Each runs once."""
    return functools.cache(lambda script, root: run(script, root, tmp_path_factory.mktemp("plain") / "out"))


@pytest.fixture
def trains(run, pairs, tmp_path):
    """trains(script, root, *more): one update and a validation image; its losses are finite.

    With `resume`, a second update from the checkpoint.
    """

    def go(script, root, *more, resume=False):
        out = tmp_path / script
        validation = ["--validation_prompt", "a red circle", "--num_validation_images", 1]
        if script != "flux_lora":
            validation += ["--validation_image", pairs / "conditioning" / "000000.png"]
        if script == "flux_fill":
            validation += ["--validation_mask", pairs / "conditioning" / "000000.png"]
        losses = run(script, root, out, *validation, *more)
        assert list((out / "samples").glob("final*.png")), "no validation image"
        if resume:
            losses = run(script, root, out, "--max_train_steps", 2, "--resume_from_checkpoint", "latest", *more)
        assert len(losses) == 1 + resume and all(0 < loss < 100 for loss in losses), losses
        return out

    return go


@pytest.fixture
def refused(line, tmp_path, monkeypatch):
    """refused(script, root, words, *more): the message of a UserError that has all words. Nothing is loaded or written.

    --dry_run refuses it, too, unless `dry` is False: it reads neither weight files nor tokenizers.
    """

    def message(script, words, arguments):
        with pytest.raises(UserError) as error:
            load_script(SCRIPTS[script]).main(arguments)
        assert not [word for word in words if str(word) not in str(error.value)], f"{words} wanted: {error.value}"
        return str(error.value)

    def go(script, root, words, *more, dry=True):
        out = tmp_path / "out"
        for owner, name in ((loading, "load_model"), (encoder_stage, "run_in_child")):
            monkeypatch.setattr(
                owner, name, lambda *a, **k: pytest.fail("something was loaded before the input was checked")
            )
        arguments = line(script, root, out, *more)
        said = message(script, words, arguments)
        if dry:
            message(script, words, [*arguments, "--dry_run"])
        assert not out.exists()
        return said

    return go


def copy(root, tmp_path):
    """A copy of a pipeline that may be changed."""
    return Path(shutil.copytree(root, tmp_path / Path(root).name))


def edit(path, **changes):
    """Changes entries of a JSON file; a value of None takes its key out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
