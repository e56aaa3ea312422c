"""What the tests of the Kontext script share: pairs with sources, and the script as a module and as a command."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import StageWithoutEncoders, load_script, run_here, small_run
from flux_pairs import VAE_CONFIG, marked, write_pairs

from mindtune.data import columns, pair_data

TRAIN = "examples/flux_kontext/train_lora_flux_kontext.py"


@pytest.fixture(scope="session")
def kontext_script():
    return load_script(TRAIN)


@pytest.fixture(scope="session")
def edits(tmp_path_factory):
    """Six pairs, in turn: a source of the target's size, one of another shape, and none.

    Targets are wide (48x32) and tall (32x48) in turn. Their blue is their number; a source has other colours.
    """
    pairs = []
    for number in range(6):
        height, width = (32, 48) if number % 2 == 0 else (48, 32)
        source = [marked(number, height, width), marked(number, 40, 40), None][number % 3]
        source = source if source is None else 255 - source
        pairs.append((marked(number, height, width), source, f"edit {number % 3}"))
    return write_pairs(tmp_path_factory.mktemp("edits") / "pairs", pairs)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Six edits of the shapes world, 48 pixels square: targets, sources, instructions."""
    folder = tmp_path_factory.mktemp("shapes") / "edits"
    load_script("examples/tiny/shapes.py").make_edits(folder, 6, 48, seed=0, split="train")
    return folder


@pytest.fixture(scope="session")
def kontext_flags(small_flux, edits, encoder_cache):
    """kontext_flags(out, *more): the command line of a small PyNative run on `edits`. Later flags win."""

    def make(out, *more):
        values = {
            "pretrained_model_name_or_path": small_flux,
            "train_data_dir": edits,
            "cache_dir": encoder_cache,
            "aspect_ratio_buckets": "32,48;48,32",
            "max_sequence_length": 16,
            "learning_rate": 1e-3,
        }
        return small_run(out, values, *more)

    return make


@pytest.fixture(scope="session")
def kontext(kontext_script, kontext_flags):
    """kontext(out, *flags): runs the Kontext script in this process and returns `out`."""

    def run(out, *more):
        run_here(kontext_script, kontext_flags(out, *more))
        return Path(out)

    return run


@pytest.fixture(scope="session")
def finished_kontext(kontext, tmp_path_factory):
    """finished_kontext(*flags): the output directory of a finished run, not to be changed. The same flags run once."""
    return functools.cache(lambda *more: kontext(tmp_path_factory.mktemp("finished") / "run", *more))


@pytest.fixture
def batches(kontext_script, kontext_flags):
    """batches(*flags): the `data` of a run, and `make(uses)`, whose text is zeros."""

    def load(*more):
        args = kontext_script.parse_args(kontext_flags("unused", *more))
        source = args.select(columns.Source, condition_optional=True)
        settings = args.select(pair_data.Settings, own_condition_size=True)
        data = pair_data.load(source, settings, 0, encode_conditions=True)
        made = kontext_script.Batches(args, StageWithoutEncoders(), data, VAE_CONFIG, 1000)
        return SimpleNamespace(data=data, make=made.make)

    return load
