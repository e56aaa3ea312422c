"""Data sets of images with captions, in every form that the pairs' data sets have (those are tested with the pairs)."""

import base64
import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.columns import Source
from mindtune.data.tables import samples_in_dataset


@pytest.fixture(autouse=True)
def library_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("library"))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(seed=0):
    file = io.BytesIO()
    noise(20, 16, seed).save(file, "png")
    return file.getvalue()


# ---- images with captions ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagefolder")
    for number in range(3):
        noise(20, 16, number).save(folder / f"{number}.png")
    rows = [{"file_name": f"{n}.png", "text": f"caption {n}", "other": n} for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def read_dataset(folder, cache, image_column=None, caption_column=None):
    return samples_in_dataset(
        Source(str(folder), cache_dir=str(cache), image_column=image_column, caption_column=caption_column)
    )


def test_a_dataset_gives_the_files_bytes_and_captions(imagefolder, tmp_path):
    samples = read_dataset(imagefolder, tmp_path, caption_column="text")
    assert [sample.caption for sample in samples] == ["caption 0", "caption 1", "caption 2"]
    for number, sample in enumerate(samples):
        assert sample.read() == (imagefolder / f"{number}.png").read_bytes()
        np.testing.assert_array_equal(np.asarray(sample.open()), np.asarray(noise(20, 16, number)))


def test_a_dataset_without_caption_column_has_no_captions(imagefolder, tmp_path):
    assert [sample.caption for sample in read_dataset(imagefolder, tmp_path)] == [None] * 3


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"caption_column": "txt"}, "--caption_column txt: .*has the columns image, text, other"),
        ({"image_column": "img"}, "--image_column img: .*has the columns"),
        ({"image_column": "text"}, "(?s)3 files named in metadata.jsonl are missing.*caption 0 .line 1"),
    ],
)
def test_a_wrong_column_is_answered_with_the_right_ones(imagefolder, tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_dataset(imagefolder, tmp_path, **columns)


def test_a_dataset_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"(?s)--dataset_name .*cannot read it.* folder of images .* as --instance_data_dir"
    ):
        read_dataset(tmp_path / "empty", tmp_path)


def test_images_without_metadata_are_in_the_librarys_order(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    assert [sample.read() for sample in read_dataset(tmp_path, tmp_path / "cache")] == [
        png(number) for number in range(3)
    ]


# ---- one data set in every form ------------------------------------------------------------------


CELLS = [{"bytes": png(number), "path": f"{number}.png"} for number in range(3)]
WORDS = ["one", None, "three"]


def typed():
    return datasets.Dataset.from_dict({"image": CELLS, "text": WORDS}).cast_column("image", datasets.Image())


def as_parquet(folder):
    typed().to_parquet(folder / "train.parquet")


def as_parquet_of_plain_structs(folder):
    pq.write_table(pa.table({"image": pa.array(CELLS), "text": WORDS}), folder / "train.parquet")


def as_parquet_of_bytes(folder):
    pq.write_table(pa.table({"image": [cell["bytes"] for cell in CELLS], "text": WORDS}), folder / "train.parquet")


def as_parquet_of_base64(folder):
    pq.write_table(
        pa.table({"image": [base64.b64encode(cell["bytes"]).decode() for cell in CELLS], "text": WORDS}),
        folder / "a.parquet",
    )


def as_parquet_of_paths(folder):
    (folder / "images").mkdir()
    for number in range(3):
        (folder / f"images/{number}.png").write_bytes(png(number))
    pq.write_table(
        pa.table({"image": [f"images/{number}.png" for number in range(3)], "text": WORDS}), folder / "train.parquet"
    )


def as_saved(folder):
    typed().save_to_disk(folder)


def as_saved_with_splits(folder):
    datasets.DatasetDict({"test": typed().select([0]), "train": typed()}).save_to_disk(folder)


def as_arrow(folder):
    typed().save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).rename(folder / "data.arrow")
    for path in (folder / "saved").iterdir():
        path.unlink()


def as_shard(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(3):
            for ending, content in (("png", png(number)), ("txt", (WORDS[number] or "").encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def as_csv(folder):
    as_parquet_of_paths(folder)
    (folder / "train.parquet").unlink()
    (folder / "metadata.csv").write_text(
        "".join(
            f"{a},{b or ''}\n" for a, b in zip(["file_name", *[f"images/{n}.png" for n in range(3)]], ["text", *WORDS])
        )
    )


FORMS = [value for name, value in list(globals().items()) if name.startswith("as_")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_images_and_captions(tmp_path, form):
    (tmp_path / "set").mkdir()
    form(tmp_path / "set")
    samples = read_dataset(
        tmp_path / "set", tmp_path / "cache", "png" if form is as_shard else None, "txt" if form is as_shard else "text"
    )
    assert [sample.read() for sample in samples] == [png(number) for number in range(3)]
    assert [sample.caption for sample in samples] == WORDS
    assert samples[1].name == f"{tmp_path / 'set'}[1]"


def test_the_first_image_column_is_used_as_before(tmp_path):
    """Columns of text named like images do not come before one of images."""
    rows = {"image": ["words", "words"], "photo": CELLS[:2], "png": CELLS[1:]}
    table = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image()).cast_column("png", datasets.Image())
    table.select_columns(["image", "photo"]).to_parquet(tmp_path / "train.parquet")
    assert [sample.read() for sample in read_dataset(tmp_path, tmp_path / "cache")] == [png(0), png(1)]


# ---- what is left out ----------------------------------------------------------------------------


def said(folder, **options):
    lines = []
    samples_in_dataset(Source(str(folder), cache_dir=str(folder.parent / "cache"), **options), lines.append)
    return lines


def test_other_splits_and_files_are_named(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    as_parquet(folder)
    (captions,) = said(folder)
    (folder / "README.md").write_text("x")
    (folder / "extra.csv").write_text("a,b\n1,2\n")
    assert said(folder) == [
        f"--dataset_name {folder}: 1 files are not used; those used end in .parquet: extra.csv",
        captions,
    ]
    (folder / "extra.csv").unlink()
    typed().to_parquet(folder / "test.parquet")
    assert said(folder) == [f"--dataset_name {folder}: only the split train is used, not test", captions]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_captions_that_are_not_asked_for_are_named(tmp_path, form):
    folder = tmp_path / "set"
    folder.mkdir()
    form(folder)
    name = "txt" if form is as_shard else "text"
    line = f"--dataset_name {folder}: the column {name} is not used; add --caption_column {name} to read captions from it"
    assert line in said(folder)
    line = f"--dataset_name {folder}: 2 of 3 images have a caption of their own; without: {folder}[1]"
    found = said(folder, caption_column=name)
    assert line in found and not any("--caption_column" in line for line in found)


@pytest.mark.parametrize("name", ["caption", None])
@pytest.mark.parametrize("first", ["a", "b"])
def test_parquet_files_of_other_columns_are_named(tmp_path, name, first):
    """A library of two exports, of which one has no captions, or has them under another name."""
    folder = tmp_path / "set"
    folder.mkdir()
    second = "b" if first == "a" else "a"
    pq.write_table(
        pa.table({"image": [cell["bytes"] for cell in CELLS], "text": ["x"] * 3}), folder / f"{first}.parquet"
    )
    columns = {"image": [CELLS[0]["bytes"]], **({name: ["y"]} if name else {})}
    pq.write_table(pa.table(columns), folder / f"{second}.parquet")
    lines = said(folder)
    assert sum("1 files have other columns than" in line and "b.parquet (" in line for line in lines) == 1
    assert len(read_dataset(folder, tmp_path / "cache")) == 4
    if first == "a":
        found = said(folder, caption_column="text")
        assert any(f"3 of 4 images have a caption of their own; without: {folder}[3]" in line for line in found)


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}),
        tmp_path / "set/train.parquet",
    )
    with pytest.raises(UserError, match="the data set has no rows"):
        said(tmp_path / "set")


def test_columns_of_kinds_that_the_library_lacks_do_not_matter(tmp_path):
    (tmp_path / "set").mkdir()
    extra = pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64()))
    columns = {"meta": extra, "Image": pa.array([{"bytes": cell["bytes"]} for cell in CELLS]), "Text": WORDS}
    pq.write_table(pa.table(columns), tmp_path / "set/train.parquet")
    samples = read_dataset(tmp_path / "set", tmp_path / "cache", caption_column="Text")
    assert [(sample.read(), sample.caption) for sample in samples] == [
        (cell["bytes"], words) for cell, words in zip(CELLS, WORDS)
    ]


def test_git_lfs_pointers_are_named(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    for ending in ("parquet", "tar", "arrow"):
        file = tmp_path / f"set/data/train.{ending}"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
        with pytest.raises(UserError, match=rf"(?s)1 files are Git LFS pointers:.*train.{ending}\nRun git lfs pull"):
            said(tmp_path / "set")
        file.unlink()


@pytest.mark.parametrize("ending", ["PNG", "heic"])
def test_shards_with_endings_in_capitals_or_of_photos(tmp_path, ending):
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


def test_photos_that_the_library_does_not_read_have_a_way(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.heic"):
        (folder / name).write_bytes(png())
    (line,) = said(folder)
    assert (
        "1 files are not used; those used end in .png: c.heic. Images of all formats are read if metadata.jsonl names them"
        in line
    )


def test_names_that_are_not_utf8_are_named(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "caf\udce9.png"):
        (folder / name).write_bytes(png())
    with pytest.raises(UserError, match=r"needs file names in UTF-8; 1 are not: .*caf.xe9.png. Rename them"):
        said(folder)


def test_one_column_is_not_both_image_and_caption(tmp_path):
    (tmp_path / "set").mkdir()
    as_parquet(tmp_path / "set")
    with pytest.raises(UserError, match="column image is named for two purposes"):
        said(tmp_path / "set", image_column="image", caption_column="image")


def test_metadata_beside_other_data_files_do_not_take_their_place(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    as_saved(folder)
    (folder / "metadata.csv").write_text("something,else\n1,2\n")
    (folder / "metadata.jsonl").write_text("{}")
    assert len(samples_in_dataset(Source(str(folder)), print)) == 3


def test_images_that_metadata_do_not_name_are_counted(tmp_path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.png"):
        (folder / name).write_bytes(png())
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "clip.mp4").write_bytes(b"x")
    rows = [
        {"file_name": "A.png", "text": "x"},
        {"file_name": "sub\\d.png", "text": "y"},
        {"file_name": "a.png", "text": "x"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    repeated, others, unnamed = said(folder, caption_column="text")
    assert "1 lines of metadata.jsonl repeat an earlier line; each is a sample of its own" in repeated
    assert "1 files next to metadata.jsonl are not used: clip.mp4" in others
    assert "2 images are not used, because metadata.jsonl does not name them: b.png, sub/c.png" in unnamed


def test_a_folder_of_images_with_caption_files_is_pointed_elsewhere(tmp_path):
    """The library takes it for a data set of text."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(png())
    for name in "abc":
        (tmp_path / f"set/{name}.txt").write_text("a caption")
    with pytest.raises(
        UserError, match="--image_column: .*Give a folder of images with caption files as --instance_data_dir"
    ):
        said(tmp_path / "set")


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    as_saved(tmp_path / "set")
    with pytest.raises(UserError, match=r"caf.xe9 is not UTF-8, which the datasets library needs"):
        said(folder)
