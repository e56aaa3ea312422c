"""Pairs for ControlNet training, read from every kind of data set."""

import json
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from mindtune.cli import UserError
from mindtune.data.columns import Source
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import Pairs, load_pairs

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "tiny"))
import shapes

from .pair_files import (
    COUNT,
    FORMS,
    WANTED,
    as_folder,
    as_jsonl,
    as_parquet,
    contents,
    notes_on_pairs,
    refusal,
    table,
    write_files,
    write_lines,
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_pairs(sources, form):
    pairs = load_pairs(Source(**sources[form]))
    assert len(pairs) == COUNT and contents(pairs) == WANTED


def test_the_shapes_example_loads(tmp_path):
    shapes.make_folder(tmp_path / "world", 5, 16, 0, "train")
    rows = [json.loads(line) for line in (tmp_path / "world" / "metadata.jsonl").read_text().splitlines()]
    for flag in ("train_data_dir", "dataset_name"):
        pairs = load_pairs(Source(**{flag: str(tmp_path / "world")}, cache_dir=str(tmp_path / "cache")))
        assert [pair.caption for pair in pairs] == [row["text"] for row in rows]
        for pair, row in zip(pairs, rows):
            assert pair.image.read() == (tmp_path / "world" / row["image_file_name"]).read_bytes()
            assert pair.condition.name == str(tmp_path / "world" / row["conditioning_image_file_name"])


def test_images_are_named_by_their_file_or_their_row(sources):
    arguments = sources[as_jsonl]
    assert load_pairs(Source(**arguments))[6].image.name == str(
        Path(arguments["jsonl_for_train"]).parent / "data/images/6.png"
    )
    arguments = sources[as_parquet]
    assert load_pairs(Source(**arguments))[6].condition.name == f"{arguments['train_data_dir']}[6]"


def test_pairs_are_a_sequence(sources):
    pairs = load_pairs(Source(**sources[as_parquet]))
    assert pairs[-1].caption == "caption 6"
    with pytest.raises(IndexError):
        pairs[7]
    chosen = pairs.select([5, 1, 5]).select(np.array([0, 1]))
    assert isinstance(chosen, Pairs) and len(chosen) == 2
    assert contents(chosen) == [WANTED[5], WANTED[1]] and chosen[0].image.name.endswith("[5]")


def test_pairs_pickle_without_their_images(tmp_path):
    large = [np.random.default_rng(n).bytes(100_000) for n in range(COUNT)]
    table(image=large).to_parquet(tmp_path / "train.parquet")
    pairs = load_pairs(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))).select([2, 0])
    packed = pickle.dumps(pairs)
    assert len(packed) < 50_000
    assert [pair.image.read() for pair in pickle.loads(packed)] == [large[2], large[0]]


def test_an_image_may_have_several_conditions_and_captions(tmp_path):
    """Each line is a pair, and nothing is reported."""
    write_files(tmp_path)
    rows = [
        {"file_name": "images/0.png", "conditioning_image_file_name": f"conditions/{n}.png", "text": f"{text}"}
        for n in range(COUNT) for text in "ab"
    ]  # fmt: skip
    for number in range(1, COUNT):
        (tmp_path / f"images/{number}.png").unlink()
    write_lines(tmp_path / "metadata.jsonl", rows)
    assert notes_on_pairs(train_data_dir=str(tmp_path), cache_dir=str(tmp_path.parent / "cache")) == []


# ---- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_missing_and_empty_sources_are_refused(tmp_path, open_pairs):
    (tmp_path / "empty").mkdir()
    found = refusal(open_pairs, train_data_dir=str(tmp_path / "absent"))
    assert "--train_data_dir" in found and "no such directory. Give the directory that holds the pairs" in found
    found = refusal(open_pairs, dataset_name=str(tmp_path / "empty"))
    assert "--dataset_name" in found and "cannot read it" in found and "Give a directory with metadata.jsonl" in found
    found = refusal(open_pairs, jsonl_for_train=str(tmp_path / "absent.jsonl"))
    assert "--jsonl_for_train" in found and "no such file. Give a .jsonl file" in found


def test_a_data_set_without_rows_is_refused(tmp_path):
    kinds = datasets.Features(dict.fromkeys(["image", "conditioning_image", "text"], datasets.Value("string")))
    datasets.Dataset.from_dict({name: [] for name in kinds}, features=kinds).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    pq.write_table(table().data.table.slice(0, 0), tmp_path / "parquet" / "train.parquet")
    assert "the data set has no rows" in refusal(train_data_dir=str(tmp_path / "saved"))
    assert "the data set has no rows" in refusal(
        train_data_dir=str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert "of size 0" in refusal(PairStream, train_data_dir=str(tmp_path / "saved"))
    with pytest.raises(UserError, match="the data set has no rows"):
        next(iter(PairStream(Source(train_data_dir=str(tmp_path / "parquet")))))


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_a_directory_that_is_not_utf8_is_refused(tmp_path, open_pairs):
    as_folder(tmp_path / "caf\udce9")
    assert "caf\\xe9 is not UTF-8" in refusal(open_pairs, train_data_dir=str(tmp_path / "caf\udce9"))
    assert "caf\\xe9/metadata.jsonl is not UTF-8" in refusal(
        open_pairs, jsonl_for_train=str(tmp_path / "caf\udce9/metadata.jsonl")
    )
