"""What the tests of the ControlNet scripts share: pairs of both kinds of shape, and the scripts as modules and as commands."""

import json
import os
import shutil
import subprocess

import mindspore as ms
import numpy as np
import pytest
from conftest import command, load_script
from PIL import Image
from safetensors.numpy import load_file, save_file

from mindtune.data import pair_data, pairs
from mindtune.encode import encoder_stage

TRAIN = "flux_controlnet/train_controlnet_flux.py"
FINAL = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def control_script():
    return load_script(TRAIN)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Six pairs of the shapes world, 48 pixels square: pictures, their outlines, captions."""
    folder = tmp_path_factory.mktemp("shapes") / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(folder, 6, 48, seed=0, split="train")
    return folder


@pytest.fixture(scope="session")
def small_flux(tiny_flux, tmp_path_factory):
    """The tiny pipeline with one block of either kind in its transformer: half to compute and compile, the same encoders."""
    folder = shutil.copytree(tiny_flux, tmp_path_factory.mktemp("pipeline") / "small") / "transformer"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 1, "num_single_layers": 1}))
    tensors = {name: value for name, value in load_file(folder / FINAL).items() if "transformer_blocks.1." not in name}
    save_file(tensors, folder / FINAL, metadata={"format": "pt"})
    return folder.parent


def write_pairs(folder, images, conditions, captions):
    """A folder that --train_data_dir reads, from uint8 arrays."""
    rows = []
    for number, (image, condition, caption) in enumerate(zip(images, conditions, captions)):
        row = {
            "file_name": f"images/{number}.png",
            "conditioning_image_file_name": f"conditioning/{number}.png",
            "text": caption,
        }
        for name, pixels in zip((row["file_name"], row["conditioning_image_file_name"]), (image, condition)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def marked(number, height, width):
    """uint8 [height, width, 3] that tells where it came from: red is the column, green the row, blue the picture."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 40 * number)], axis=2).astype(np.uint8)


@pytest.fixture(scope="session")
def oblong(tmp_path_factory):
    """Six pairs, wide (48x32) and tall (32x48) by turns, the condition the picture's negative: both show where they were cropped."""
    images = [marked(number, *((32, 48) if number % 2 == 0 else (48, 32))) for number in range(6)]
    folder = tmp_path_factory.mktemp("oblong") / "pairs"
    return write_pairs(
        folder, images, [255 - image for image in images], [f"picture {number % 3}" for number in range(6)]
    )


@pytest.fixture(scope="session")
def warm_cache(encoder_cache, control_script, tiny_flux, shapes, oblong):
    """The session's encoder cache, filled in one child process with what most runs here need."""
    stage = encoder_stage.EncoderStage(tiny_flux, None, "no", encoder_cache / "mindtune", 16)
    groups = [
        pairs.load_pairs(pairs.Source(train_data_dir=str(folder), cache_dir=str(encoder_cache)))
        for folder in (shapes, oblong)
    ]
    sizes = [[(32, 32)], [(32, 48), (48, 32)]]
    images = [
        job
        for group, buckets in zip(groups, sizes)
        for job in pair_data.PairImages(pair_data.PairData(group, [], buckets, 0, 1), True)
    ]
    stage.prepare(
        ["", "x", "a red circle", "a blue star", *(pair.caption for group in groups for pair in group)], images
    )
    return encoder_cache


@pytest.fixture
def control_flags(small_flux, shapes, warm_cache):
    """control_flags(out, *more): the command line of a small PyNative run on the shapes; later flags win over earlier ones."""

    def make(out, *more):
        base = [
            "--pretrained_model_name_or_path",
            small_flux,
            "--train_data_dir",
            shapes,
            "--output_dir",
            out,
            "--cache_dir",
            warm_cache,
        ]
        base += [
            "--resolution",
            32,
            "--max_sequence_length",
            16,
            "--seed",
            0,
            "--train_batch_size",
            1,
            "--max_train_steps",
            3,
        ]
        base += [
            "--num_double_layers",
            1,
            "--num_single_layers",
            1,
            "--learning_rate",
            1e-3,
            "--num_inference_steps",
            2,
        ]
        base += ["--mindspore_mode", 1, "--report_to", "none"]
        return [str(part) for part in (*base, *more)]

    return make


@pytest.fixture
def control(control_script, control_flags, monkeypatch):
    """control(out, *flags): the same as `train_control` in this process, which has everything imported: no signals, no exit."""

    def run(out, *more):
        monkeypatch.setattr(control_script, "StopRequest", lambda: type("Never", (), {"exit_code": None})())
        assert control_script.main(control_flags(out, *more)) == 0
        ms.set_context(mode=ms.PYNATIVE_MODE)

    return run


@pytest.fixture
def train_control(control_flags):
    """train_control(out, *flags): runs the ControlNet script as a user does, in a process of its own; gives the finished process."""

    def run(out, *more, check=0, **settings):
        done = subprocess.run(
            command(TRAIN, control_flags(out, *more)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **settings,
        )  # fmt: skip
        assert done.returncode == check, done.stdout[-4000:]
        return done

    return run
