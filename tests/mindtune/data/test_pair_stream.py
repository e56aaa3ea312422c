"""Pairs that are streamed: their order, where they start, and what cannot be read."""

import io
import pickle
from itertools import islice

import datasets
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.columns import Source
from mindtune.data.pair_stream import PairStream

from .pair_files import (
    CAPTIONS,
    CONDITIONS,
    COUNT,
    FORMS,
    IMAGES,
    SOME_FORMS,
    SOME_WANTED,
    WANTED,
    WHITE,
    as_folder,
    as_parquet,
    as_saved,
    as_shards,
    contents,
    drawing,
    shard,
    some_as_folder,
    table,
    write_tar,
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_streams_the_same_pairs(sources, form):
    """In one pass, in any order."""
    stream = PairStream(Source(**sources[form]), seed=3, buffer_size=4, count=COUNT)
    assert sorted(contents(stream)) == sorted(WANTED)


@pytest.mark.parametrize("form", [as_shards, as_folder, as_parquet, as_saved], ids=lambda form: form.__name__)
def test_a_stream_can_start_at_every_position(sources, form):
    """For more than three passes, also from the middle of the last one."""
    stream = PairStream(Source(**sources[form]), seed=5, buffer_size=3, count=24)
    whole = list(stream)
    assert len(whole) == 24 and list(stream) == whole
    for start in range(26):
        assert list(stream.from_position(start)) == whole[start:]
    assert contents(stream.from_position(22)) == contents(whole[22:])


def test_every_pass_and_every_seed_has_an_order_of_its_own(sources):
    def passes(**options):
        captions = [
            pair.caption
            for pair in PairStream(Source(**sources[as_parquet]), **{"count": 28, "buffer_size": 7, **options})
        ]
        return [captions[start : start + 7] for start in range(0, 28, 7)]

    found = passes(seed=1)
    assert all(sorted(each) == CAPTIONS for each in found) and len(set(map(tuple, found))) > 1
    assert passes(seed=1) == found != passes(seed=2)
    assert passes(seed=1, buffer_size=1) == [CAPTIONS] * 4


def test_a_stream_without_count_is_endless(sources):
    stream = PairStream(Source(**sources[as_parquet]), seed=0)
    assert len(list(islice(stream, 100))) == 100


def test_two_iterations_at_once_do_not_affect_each_other(sources):
    stream = PairStream(Source(**sources[as_parquet]), seed=0, buffer_size=4, count=20)
    assert list(zip(stream, stream)) == [(pair, pair) for pair in stream]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_stream_pickles(sources, form):
    stream = PairStream(Source(**sources[form]), seed=1, buffer_size=3, count=10)
    assert contents(pickle.loads(pickle.dumps(stream))) == contents(stream)


def test_streamed_samples_hold_encoded_bytes(sources):
    pair = next(iter(PairStream(Source(**sources[as_folder]), seed=0)))
    assert isinstance(pair.image.source, bytes) and isinstance(pair.condition.source, bytes)
    assert pair.image.name == f"{sources[as_folder]['train_data_dir']}, position 0 of the stream"


def test_a_stream_examines_later_rows_for_transparent_conditions(tmp_path, capsys):
    """The first twenty rows are opaque, one of them empty and one not an image."""
    (tmp_path / "d").mkdir()
    conditions = [CONDITIONS[0], None, b"none", *[CONDITIONS[1]] * 17, *(drawing(WHITE, n) for n in range(20))]
    images = [IMAGES[n % COUNT] for n in range(40)]
    rows = {"image": images, "conditioning_image": conditions, "text": ["x"] * 40}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d/train.parquet")
    stream = PairStream(Source(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")))
    assert stream.background == "black"
    assert (
        ", 30 pairs of its first 256 rows: 16 transparent condition images are put on black" in capsys.readouterr().out
    )


# ---- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["s3://b/a.png", "a\0b", "foo://x", "file://x\0y", "data:image/png;base64,%"])
@pytest.mark.parametrize("column, what", [("image", "image"), ("conditioning_image", "condition")])
def test_an_unreadable_cell_raises_when_the_stream_reaches_it(tmp_path, cell, column, what):
    rows = {"image": ["a.png"] * 2, "conditioning_image": ["a.png"] * 2, "text": ["x"] * 2}
    rows[column] = ["a.png", cell]
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    pairs = iter(PairStream(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")), buffer_size=1))
    next(pairs)
    with pytest.raises(UserError, match=f"position 1 of the stream: its {what}: .*Fix the data set"):
        next(pairs)


@pytest.mark.parametrize("column, what", [("image", "image"), ("conditioning_image", "condition")])
def test_a_missing_image_raises_when_the_stream_reaches_it(tmp_path, column, what):
    """A stream that starts after the pair, as in a resumed run, does not report it."""
    table(**{column: [*IMAGES[:3], None, *IMAGES[4:]]}).to_parquet(tmp_path / "train.parquet")
    stream = PairStream(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")), buffer_size=1, count=7)
    pairs = iter(stream)
    assert [next(pairs).caption for _ in range(3)] == CAPTIONS[:3]
    with pytest.raises(UserError, match=f"position 3 of the stream: its {what}: missing.*Fix the data set"):
        next(pairs)
    assert [pair.caption for pair in stream.from_position(4)] == CAPTIONS[4:]


def test_a_stream_that_fails_reports_the_pass(tmp_path):
    samples = shard(range(COUNT))
    samples["0006"]["txt"] = b"caf\xe9"
    write_tar(tmp_path / "0.tar", samples)
    stream = iter(PairStream(Source(train_data_dir=str(tmp_path)), buffer_size=1))
    with pytest.raises(UserError, match="cannot continue reading in pass 0: UnicodeDecodeError"):
        list(islice(stream, COUNT))


# ---- pairs without a condition -------------------------------------------------------------------


@pytest.mark.parametrize("form", SOME_FORMS, ids=lambda form: form.__name__)
def test_streamed_pairs_may_lack_a_condition(some_sources, form, capsys):
    stream = PairStream(Source(**some_sources[form]), seed=3, buffer_size=1, count=COUNT)
    assert sorted(contents(stream), key=lambda pair: pair[2]) == SOME_WANTED
    assert ", 7 pairs of its first 256 rows: 2 of 7 pairs have no condition, such as " in capsys.readouterr().out


def test_a_streamed_pair_that_needs_a_condition_is_an_error_when_it_is_reached(some_sources):
    source = Source(**some_sources[some_as_folder])
    pairs = iter(PairStream(source, buffer_size=1, own_condition_size=True))
    assert contents(islice(pairs, 4)) == SOME_WANTED[:4]
    with pytest.raises(UserError, match="position 4 of the stream: has no condition.* leave --streaming out"):
        next(pairs)


def test_a_stream_that_needs_conditions_and_has_no_column_of_them_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    table(conditioning_image=None).to_parquet(tmp_path / "d/train.parquet")
    source = Source(train_data_dir=f"{tmp_path}/d", cache_dir=str(tmp_path / "cache"), condition_optional=True)
    with pytest.raises(UserError, match="has no column of conditions.* leave --streaming out"):
        PairStream(source, own_condition_size=True)


def test_notes_on_streamed_conditions_of_another_size(tmp_path):
    """Such a pair is no bad one, so what is found of its condition counts."""
    large = Image.open(io.BytesIO(drawing(WHITE))).resize((48, 32))
    file = io.BytesIO()
    large.save(file, "png")
    (tmp_path / "d").mkdir()
    table(2, conditioning_image=[file.getvalue()] * 2).to_parquet(tmp_path / "d/train.parquet")
    source = Source(train_data_dir=f"{tmp_path}/d", cache_dir=str(tmp_path / "cache"))
    assert PairStream(source, own_condition_size=True).background == "black"
    assert PairStream(source).background == "white"
