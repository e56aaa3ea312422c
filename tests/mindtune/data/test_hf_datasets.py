"""Data sets that the `datasets` library opens: splits, shards, parquet, and the files that it does not read."""

import io
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindtune.cli import UserError
from mindtune.data.columns import Source
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import load_pairs

from .image_files import noise, png
from .pair_files import (
    CAPTIONS,
    COUNT,
    as_metadata_csv,
    as_shards,
    notes_on_pairs,
    refusal,
    shard,
    table,
    write_tar,
)
from .table_files import CELLS, WORDS, notes_on_images, read_dataset

# ---- splits and shards ---------------------------------------------------------------------------


def test_several_splits_without_train_are_refused(tmp_path):
    datasets.DatasetDict({"test": table(2), "dev": table(2)}).save_to_disk(tmp_path / "d")
    assert "has the splits test, dev, not train" in refusal(train_data_dir=str(tmp_path / "d"))


def test_unused_folders_besides_train_are_reported(tmp_path):
    for name in ("train", "test"):
        as_metadata_csv(tmp_path / "d" / name)
    assert notes_on_pairs(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")) == [
        "only train/ is used, not test"
    ]


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_shards_with_unlike_samples_are_refused(tmp_path, open_pairs):
    samples = shard(range(3))
    del samples["0001"]["conditioning.png"]
    write_tar(tmp_path / "0.tar", samples)
    found = refusal(open_pairs, train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert "--train_data_dir" in found and "needs the same files, such as 01.image.png, 01.conditioning.png" in found


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_truncated_shards_are_listed(tmp_path, open_pairs):
    """The library would read them as shorter shards without an error."""
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", shard(range(COUNT)))
    for number in (0, 2):
        whole = (tmp_path / f"{number}.tar").read_bytes()
        (tmp_path / f"{number}.tar").write_bytes(whole[: len(whole) // 2])
    found = refusal(open_pairs, train_data_dir=str(tmp_path))
    assert "2 of 3 shards are truncated" in found and "0.tar" in found and "2.tar" in found and "1.tar" not in found


@pytest.mark.parametrize("ending", ["PNG", "heic"])
def test_shards_with_suffixes_in_upper_case_or_of_heic(tmp_path, ending):
    (tmp_path / "set").mkdir()
    file = io.BytesIO()
    noise(20, 16).save(file, "HEIF" if ending == "heic" else "png")
    with tarfile.open(tmp_path / "set/0.tar", "w") as tar:
        for number in range(3):
            for name, content in ((ending, file.getvalue()), ("TXT", b"words")):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples = read_dataset(tmp_path / "set", tmp_path / "cache", caption_column="txt")
    assert [(sample.read(), sample.caption) for sample in samples] == [(file.getvalue(), "words")] * 3


def test_git_lfs_pointers_are_refused(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    for ending in ("parquet", "tar", "arrow"):
        file = tmp_path / f"set/data/train.{ending}"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
        with pytest.raises(UserError, match=rf"(?s)1 files are Git LFS pointers:.*train.{ending}\nRun git lfs pull"):
            notes_on_images(tmp_path / "set")
        file.unlink()


# ---- parquet -------------------------------------------------------------------------------------


def test_an_edited_parquet_file_is_read_again(tmp_path):
    (tmp_path / "data").mkdir()
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        table(text=captions).to_parquet(tmp_path / "data" / "train.parquet")
        assert [
            pair.caption
            for pair in load_pairs(Source(train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")))
        ] == captions


@pytest.mark.parametrize("name", ["caption", None])
@pytest.mark.parametrize("first", ["a", "b"])
def test_parquet_files_with_other_columns_are_reported(tmp_path, name, first):
    """Two exports, of which one has no captions, or has them under another name."""
    folder = tmp_path / "set"
    folder.mkdir()
    second = "b" if first == "a" else "a"
    pq.write_table(
        pa.table({"image": [cell["bytes"] for cell in CELLS], "text": ["x"] * 3}), folder / f"{first}.parquet"
    )
    columns = {"image": [CELLS[0]["bytes"]], **({name: ["y"]} if name else {})}
    pq.write_table(pa.table(columns), folder / f"{second}.parquet")
    lines = notes_on_images(folder)
    assert sum("1 files have other columns than" in line and "b.parquet (" in line for line in lines) == 1
    assert len(read_dataset(folder, tmp_path / "cache")) == 4
    if first == "a":
        found = notes_on_images(folder, caption_column="text")
        assert any(f"3 of 4 images have a caption of their own; without: {folder}[3]" in line for line in found)


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}),
        tmp_path / "set/train.parquet",
    )
    with pytest.raises(UserError, match="the data set has no rows"):
        notes_on_images(tmp_path / "set")


def test_columns_of_types_that_the_library_lacks_are_ignored(tmp_path):
    (tmp_path / "set").mkdir()
    extra = pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64()))
    columns = {"meta": extra, "Image": pa.array([{"bytes": cell["bytes"]} for cell in CELLS]), "Text": WORDS}
    pq.write_table(pa.table(columns), tmp_path / "set/train.parquet")
    samples = read_dataset(tmp_path / "set", tmp_path / "cache", caption_column="Text")
    assert [(sample.read(), sample.caption) for sample in samples] == [
        (cell["bytes"], words) for cell, words in zip(CELLS, WORDS)
    ]


def test_only_types_that_the_library_lacks_are_ignored(tmp_path, monkeypatch):
    """Other errors of the library are reported instead of dropping the column."""

    def fail(arrow_type):
        raise NotImplementedError("a bug of the library")

    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": [CELLS[0]["bytes"]]}), tmp_path / "set/train.parquet")
    monkeypatch.setattr(datasets.features.features, "generate_from_arrow_type", fail)
    with pytest.raises(UserError, match="the datasets library cannot read it: a bug of the library"):
        notes_on_images(tmp_path / "set")


# ---- files that are not used ---------------------------------------------------------------------


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_files_that_the_library_does_not_read_are_reported(tmp_path, open_pairs):
    (tmp_path / "d").mkdir()
    as_shards(tmp_path / "d")
    table(2).to_parquet(tmp_path / "d/train.parquet")
    found = notes_on_pairs(open_pairs, train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert found == ["1 files are not used; those used end in .tar: train.parquet"]


def test_images_that_the_library_does_not_read_are_reported_with_a_remedy(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.heic"):
        (folder / name).write_bytes(png())
    (line,) = notes_on_images(folder)
    assert "1 files are not used; those used end in .png: c.heic. Images of all formats are read if" in line
    assert "if metadata.jsonl names them" in line


def test_file_names_that_are_not_utf8_are_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "caf\udce9.png"):
        (folder / name).write_bytes(png())
    with pytest.raises(UserError, match=r"needs file names in UTF-8; 1 are not: .*caf.xe9.png. Rename them"):
        notes_on_images(folder)
