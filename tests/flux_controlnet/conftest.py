"""What the tests of the ControlNet scripts share: pairs of two shapes, and the scripts as modules and as commands."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import StageWithoutEncoders, encode_here, load_script, run_command, run_here, small_run
from PIL import Image

from mindtune.data import columns, pair_data, pairs
from mindtune.encode import encoder_stage

TRAIN = "flux_controlnet/train_controlnet_flux.py"
FINAL = "diffusion_pytorch_model.safetensors"
VAE_CONFIG = {"latent_channels": 16, "block_out_channels": [1, 1, 1, 1]}


@pytest.fixture(scope="session")
def control_script():
    return load_script(TRAIN)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Six pairs of the shapes world, 48 pixels square: pictures, their outlines, captions."""
    folder = tmp_path_factory.mktemp("shapes") / "pairs"
    load_script("examples/tiny/shapes.py").make_folder(folder, 6, 48, seed=0, split="train")
    return folder


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
    """uint8 [height, width, 3]: red is the column, green the row, blue the number of the image."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 40 * number)], axis=2).astype(np.uint8)


@pytest.fixture(scope="session")
def oblong(tmp_path_factory):
    """Six pairs, wide (48x32) and tall (32x48) in turn. The condition is the image's negative: both show the crop."""
    images = [marked(number, *((32, 48) if number % 2 == 0 else (48, 32))) for number in range(6)]
    folder = tmp_path_factory.mktemp("oblong") / "pairs"
    return write_pairs(
        folder, images, [255 - image for image in images], [f"picture {number % 3}" for number in range(6)]
    )


@pytest.fixture(scope="session")
def warm_cache(encoder_cache, control_script, tiny_flux, shapes, oblong):
    """The session's encoder cache, filled at once with what most runs here need."""
    stage = encoder_stage.EncoderStage(tiny_flux, None, "no", encoder_cache / "mindtune", 16)
    captions, images = ["", "x", "a red circle", "a blue star"], []
    for folder, sizes in ((shapes, [(32, 32)]), (oblong, [(32, 48), (48, 32)])):
        found = pairs.load_pairs(columns.Source(train_data_dir=str(folder), cache_dir=str(encoder_cache)))
        data = pair_data.PairData(found, [], sizes=sizes, seed=0, batch_size=1, encode_conditions=True)
        captions += [pair.caption for pair in found]
        images += data.images(random_flip=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_stage, "run_in_child", encode_here)
        stage.prepare(captions, images)
    return encoder_cache


@pytest.fixture(scope="session")
def control_flags(small_flux, shapes, warm_cache):
    """control_flags(out, *more): the command line of a small PyNative run on the shapes. Later flags win."""

    def make(out, *more):
        values = {
            "pretrained_model_name_or_path": small_flux,
            "train_data_dir": shapes,
            "cache_dir": warm_cache,
            "max_sequence_length": 16,
            "num_double_layers": 1,
            "num_single_layers": 1,
            "learning_rate": 1e-3,
        }
        return small_run(out, values, *more)

    return make


@pytest.fixture(scope="session")
def control(control_script, control_flags):
    """control(out, *flags): runs the ControlNet script in this process and returns `out`."""

    def run(out, *more):
        run_here(control_script, control_flags(out, *more))
        return Path(out)

    return run


@pytest.fixture(scope="session")
def finished_control(control, tmp_path_factory):
    """finished_control(*flags): the output directory of a finished run, not to be changed. The same flags run once."""
    return functools.cache(lambda *more: control(tmp_path_factory.mktemp("finished") / "run", *more))


@pytest.fixture
def train_control(control_flags):
    """train_control(out, *flags, check=0): the script in a process of its own, which must exit with `check`."""

    def run(out, *more, **settings):
        return run_command(TRAIN, control_flags(out, *more), **settings)

    return run


@pytest.fixture(scope="session")
def load_data(control_script, control_flags):
    """load_data(*flags): the flags and the `PairData` of a run."""

    def load(*more):
        args = control_script.parse_args(control_flags("unused", *more))
        return args, pair_data.load(args.select(columns.Source), args.select(pair_data.Settings), 0)

    return load


@pytest.fixture
def batches(control_script, load_data):
    """batches(*flags): `data`, `iterate(first, last)`, the batches of a run, and `captions`, noted and not encoded."""

    def make(*more):
        args, data = load_data(*more)
        stage = StageWithoutEncoders()
        made = control_script.Batches(args, stage, VAE_CONFIG, data.sizes, 1000)
        iterate = lambda first, last: data.iterate(first, last, made.make, args.dataloader_num_workers)  # noqa: E731
        return SimpleNamespace(data=data, captions=stage.captions, iterate=iterate)

    return make
