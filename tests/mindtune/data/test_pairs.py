"""Pairs for ControlNet training, read from every kind of data set."""

import json
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindtune.cli import UserError
from mindtune.data import pairs as pairs_module
from mindtune.data.columns import Source
from mindtune.data.image_sample import is_empty_cell
from mindtune.data.pair_checks import preflight_pairs
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import Pairs, load_pairs

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "tiny"))
import shapes

from .pair_files import (
    CAPTIONS,
    COUNT,
    FORMS,
    IMAGES,
    SOME_FORMS,
    SOME_WANTED,
    WANTED,
    as_folder,
    as_jsonl,
    as_parquet,
    contents,
    notes_on_pairs,
    refusal,
    some_as_folder,
    some_as_jsonl,
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


# ---- pairs without a condition -------------------------------------------------------------------


@pytest.mark.parametrize("form", SOME_FORMS, ids=lambda form: form.__name__)
def test_a_pair_may_lack_a_condition_in_every_form(some_sources, form):
    """With the empty and the missing cells of each form; also in a selection, and after pickling."""
    pairs = load_pairs(Source(**some_sources[form]))
    assert contents(pairs) == contents(pairs[n] for n in range(COUNT)) == SOME_WANTED
    assert pairs.condition_count == COUNT - 2
    chosen = pickle.loads(pickle.dumps(pairs.select([6, 0, 4, 6])))
    assert contents(chosen) == [SOME_WANTED[n] for n in (6, 0, 4, 6)] and chosen.condition_count == 1


@pytest.mark.parametrize("form", SOME_FORMS, ids=lambda form: form.__name__)
def test_a_pair_without_a_condition_stays_an_error_where_each_needs_one(some_sources, form):
    """A line without the key is refused at once, an empty cell when it is opened."""
    arguments = {**some_sources[form], "condition_optional": False}
    if form in (some_as_folder, some_as_jsonl):
        assert "line 5: lacks conditioning_image; has image, text" in refusal(**arguments)
        return
    pairs = load_pairs(Source(**arguments))
    assert pairs.condition_count == COUNT
    with pytest.raises(FileNotFoundError, match="the cell of the data set is empty"):
        pairs[4].condition.open()


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_a_data_set_without_conditions_is_named_with_its_columns(tmp_path, open_pairs):
    """They may be there under another name, so the line says how to name them."""
    (tmp_path / "d").mkdir()
    table(conditioning_image=None, sketch=IMAGES).to_parquet(tmp_path / "d/train.parquet")
    arguments = {"train_data_dir": f"{tmp_path}/d", "condition_optional": True, "cache_dir": str(tmp_path / "cache")}
    (line,) = notes_on_pairs(open_pairs, **arguments)
    assert line == (
        "has the columns image, text, sketch; none is known to hold conditions, so no pair has one. "
        "Name one with --conditioning_image_column if the pairs have conditions"
    )
    if open_pairs is load_pairs:
        pairs = open_pairs(Source(**arguments))
        assert contents(pairs) == [(image, None, text) for image, _, text in WANTED] and pairs.condition_count == 0
        assert contents(preflight_pairs(pairs, 16, "--flag", False)) == contents(pairs)
    named = open_pairs(Source(**arguments, conditioning_image_column="sketch"))
    assert next(iter(named)).condition.read() in IMAGES
    assert "--conditioning_image_column scetch: " in refusal(
        open_pairs, **arguments, conditioning_image_column="scetch"
    )


@pytest.mark.parametrize("cells", [[None] * COUNT, [""] * COUNT])
def test_a_column_of_conditions_may_be_empty_throughout(tmp_path, cells):
    """Of nulls alone it has the type null."""
    columns = {"image": [{"bytes": cell} for cell in IMAGES], "conditioning_image": cells, "text": CAPTIONS}
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "d/train.parquet")
    arguments = {"train_data_dir": f"{tmp_path}/d", "cache_dir": str(tmp_path / "cache"), "condition_optional": True}
    assert notes_on_pairs(**arguments) == ["column conditioning_image is empty throughout, so no pair has a condition"]
    assert [pair.condition for pair in load_pairs(Source(**arguments))] == [None] * COUNT


def test_which_cells_are_empty_is_found_without_reading_images(tmp_path, monkeypatch):
    """As `is_empty_cell` says for each cell, over more than one block of rows."""
    kinds = [None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}, {"bytes": None, "path": "a.png"}]
    kinds += [{"bytes": b"x", "path": None}, {"bytes": b"", "path": "a.png"}]
    order = np.random.default_rng(0).integers(len(kinds), size=2500)
    rows = datasets.Dataset.from_dict({"image": [kinds[n] for n in order]})
    expected = [not is_empty_cell(kinds[n]) for n in order]
    assert [is_empty_cell(kind) for kind in kinds] == [True, True, True, False, False, False]
    assert pairs_module._filled_cells(rows, "image").tolist() == expected


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary"])
def test_empty_cells_of_every_type_of_text_and_bytes(kind):
    cells = pa.chunked_array([pa.array(["a", "", None], "string").cast(getattr(pa, kind)())] * 2)
    assert pairs_module._is_filled(cells).tolist() == [True, False, False] * 2


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
