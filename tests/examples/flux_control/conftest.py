"""What the tests of the Control-LoRA script share: pairs with conditions or masks, and the script as a module."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import StageWithoutEncoders, load_script, run_here, small_run
from flux_pairs import VAE_CONFIG, marked, write_pairs

from mindtune.data import columns, pair_data

TRAIN = "examples/flux_control/train_control_lora_flux.py"


@pytest.fixture(scope="session")
def control_lora_script():
    return load_script(TRAIN)


@pytest.fixture(scope="session")
def outlines(tmp_path_factory):
    """Six pairs, wide (48x32) and tall (32x48) in turn. The condition is the image's negative: both show the crop."""
    images = [marked(number, *((32, 48) if number % 2 == 0 else (48, 32))) for number in range(6)]
    pairs = [(image, 255 - image, f"picture {number % 3}") for number, image in enumerate(images)]
    return write_pairs(tmp_path_factory.mktemp("outlines") / "pairs", pairs)


def half_mask(height, width):
    """A mask in gray whose left half is white, and just above half of white on the right of it."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    mask[:, width // 2 : width // 2 + 4] = 128
    return mask


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """Six pairs for --fill, sizes as in `outlines`: four have a mask, `half_mask`; the others get random ones."""
    pairs = []
    for number in range(6):
        size = (32, 48) if number % 2 == 0 else (48, 32)
        mask = half_mask(*size) if number % 4 < 2 else None
        pairs.append((marked(number, *size), mask, f"picture {number % 3}"))
    return write_pairs(tmp_path_factory.mktemp("masked") / "pairs", pairs)


@pytest.fixture(scope="session")
def control_lora_flags(small_flux, outlines, encoder_cache):
    """control_lora_flags(out, *more): the command line of a small PyNative run on `outlines`. Later flags win."""

    def make(out, *more):
        values = {
            "pretrained_model_name_or_path": small_flux,
            "train_data_dir": outlines,
            "cache_dir": encoder_cache,
            "aspect_ratio_buckets": "32,48;48,32",
            "max_sequence_length": 16,
            "learning_rate": 1e-3,
        }
        return small_run(out, values, *more)

    return make


@pytest.fixture(scope="session")
def control_lora(control_lora_script, control_lora_flags):
    """control_lora(out, *flags): runs the Control-LoRA script in this process and returns `out`."""

    def run(out, *more):
        run_here(control_lora_script, control_lora_flags(out, *more))
        return Path(out)

    return run


@pytest.fixture(scope="session")
def finished_control_lora(control_lora, tmp_path_factory):
    """finished_control_lora(*flags): the output directory of a finished run, not to be changed. Each runs once."""
    return functools.cache(lambda *more: control_lora(tmp_path_factory.mktemp("finished") / "run", *more))


@pytest.fixture
def batches(control_lora_script, control_lora_flags):
    """batches(*flags): the `data` of a run, and `make(uses)`, whose text is zeros."""

    def load(*more):
        args = control_lora_script.parse_args(control_lora_flags("unused", *more))
        source = args.select(columns.Source, condition_optional=args.fill)
        data = pair_data.load(source, args.select(pair_data.Settings), 0, encode_conditions=not args.fill)
        stage = StageWithoutEncoders(lambda sample, size, flip: np.zeros((32, size[0] // 8, size[1] // 8)))
        made = control_lora_script.Batches(args, stage, VAE_CONFIG, data.sizes, 1000)
        return SimpleNamespace(data=data, make=made.make)

    return load
