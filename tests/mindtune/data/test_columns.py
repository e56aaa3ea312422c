"""Which columns of a data set hold the image, the condition and the caption."""

import re

import pytest

from mindtune.data.columns import Source
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import load_pairs

from .pair_files import CAPTIONS, CONDITIONS, COUNT, IMAGES, WANTED, contents, refusal, table, write_files


def test_columns_may_be_named_and_empty_captions_are_empty(tmp_path):
    renamed = table(
        image=None, conditioning_image=None, text=None, photo=IMAGES, edges=CONDITIONS, words=["a", None, "", *"defg"]
    )
    renamed.to_parquet(tmp_path / "train.parquet")
    columns = {"image_column": "photo", "conditioning_image_column": "edges", "caption_column": "words"}
    pairs = load_pairs(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), **columns))
    assert contents(pairs) == list(zip(IMAGES, CONDITIONS, ["a", "", "", *"defg"]))


def test_the_first_image_column_that_is_not_the_condition_is_the_target(tmp_path):
    renamed = table(image=None, conditioning_image=None, text=None, condition=CONDITIONS, photo=IMAGES, prompt=CAPTIONS)
    renamed.to_parquet(tmp_path / "train.parquet")
    assert contents(load_pairs(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")))) == WANTED


def test_one_column_is_not_both_image_and_condition(tmp_path):
    table().to_parquet(tmp_path / "train.parquet")
    found = refusal(train_data_dir=str(tmp_path), image_column="image", conditioning_image_column="image")
    assert "column image is named for two purposes. Name each column once." in found


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
@pytest.mark.parametrize(
    "columns, flags, message",
    [
        (
            {},
            {"image_column": "img"},
            "--image_column img: .* has the columns image, conditioning_image, text. Name one of them.",
        ),
        ({}, {"caption_column": "txt"}, "--caption_column txt: .* has the columns"),
        (
            {"conditioning_image": None},
            {},
            "--conditioning_image_column: .* has the columns image, text; none has a known name.",
        ),
        (
            {"text": None},
            {},
            "--caption_column: .* has the columns image, conditioning_image; none .* with --caption_column",
        ),
        ({"image": None}, {}, "--image_column: .* has the columns conditioning_image, text; none"),
        ({"text": list(range(COUNT))}, {}, "--caption_column text: holds int64, not text"),
        ({"text": [None] * COUNT}, {}, "--caption_column text: holds null, not text"),
        ({"text": [["a", "b"]] * COUNT}, {}, "--caption_column text: holds List, not text"),
        ({"text": IMAGES}, {}, "--caption_column text: holds Image, not text"),
        ({"text": [{"a": 1}] * COUNT}, {}, "--caption_column text: holds a struct, not text"),
        ({"image": list(range(COUNT))}, {}, "--image_column image: holds int64, not images"),
    ],
)
def test_unsuitable_columns_are_refused(tmp_path, open_pairs, columns, flags, message):
    table(**columns).to_parquet(tmp_path / "train.parquet")
    arguments = {"train_data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), **flags}
    assert re.search(message, refusal(open_pairs, **arguments))


def test_folders_of_pairs_without_metadata_are_refused_with_an_example(tmp_path):
    write_files(tmp_path / "d")
    found = refusal(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert (
        "--conditioning_image_column: " in found
        and 'write metadata.jsonl with lines like {"file_name": ..., "conditioning_image_file_name"' in found
    )
